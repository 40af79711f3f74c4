"""Public model architectures, as pure functions with abstract variables."""
