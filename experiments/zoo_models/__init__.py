"""Public model architectures, as pure functions with abstract variables.

Each of `convolutional`, `vision_transformers`, `decoders`, `encoders`, `recurrent`, `agents` and `structures`
ends in a table, `ENTRIES`. The models of `convolutional` that are written here are in `convolutional_linen`,
those of `structures` in `small_dense`, `small_images` and `small_sequences`. `entry` says what an entry is,
`builders` make one of a framework's module, `blocks` are what transformers share.
"""
