"""Zero-shot editing: a person's picture to a measurement, the published loop on it, and the result back to bytes.

`tasks` says what each edit knows of a picture, `levels` at which noise levels it runs, `loop` is Algorithm 4, `windows`
fits one model to larger pictures, `regions` cuts out and pastes back, `editor` puts them together for one picture.
"""
