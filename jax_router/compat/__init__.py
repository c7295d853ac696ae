"""Other systems' names over the operations of `jax_router`; import the submodules."""
