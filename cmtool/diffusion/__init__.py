r"""The mathematics that training and sampling share.

A process noises a clean image, $x_t = \alpha_t x_0 + \sigma_t z$ with unit noise $z$; in the variance-exploding process
$\alpha = 1$ and $\sigma_t = t$. Its probability-flow ODE has slope $dx/dt$ (the *velocity*), and the consistency
function $f(x, t)$ maps a point of a trajectory to the trajectory's clean end, with $f(x, \sigma_{min}) = x$.

Shapes: images are (B, C, H, W), times (B,).
"""
