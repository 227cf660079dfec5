"""A model is loaded and used in whatever thread its user likes."""

from concurrent.futures import ThreadPoolExecutor

import sphinx_jax


def test_a_model_loads_and_answers_in_another_thread():
    def ask() -> list[str]:
        return sphinx_jax.load(sphinx_jax.SHIPPED).generate(["Hello?"], max_new_tokens=4)

    with ThreadPoolExecutor(1) as pool:
        in_thread = pool.submit(ask).result()
    assert in_thread == ask()
