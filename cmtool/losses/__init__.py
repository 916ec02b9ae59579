r"""Training objectives, composed of independent parts.

One step: noise $z$ and times $(t, r)$ are drawn; a *coupling* settles which $x_0$ meets which $z$; the process makes
$x_t$; a *direction* leads to $x_r$; a *target rule* gives prediction and target; a *distance* measures, a *weighting*
weighs. Methods are rows of choices (`cmtool.config.methods`), put together in `assemble`.
"""
