"""An OpenAI-compatible HTTP server over the scheduler, and a page in the browser."""
