"""The stages, one program a module with one function run(config) -> Report; stage.py imports only the one asked for."""
