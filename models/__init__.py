"""Wan2.1 and the mathematics of FlowMask: from a video latent to a mask latent.

Capitals count pixels, lower case the latent grid:
    B batch   F frames   H W pixels   f = 1 + (F-1)/4   h = H/8   w = W/8   S DiT tokens   L text tokens
Spaces: `rgb8` uint8; `signed` -1..1; `raw` as the VAE gives it; `norm` per-channel normalised;
    `velocity` video - mask; `logits`; `prob` 0..1.  t in 0..1 (1 = video, 0 = mask), timestep = 1000 t.
"""
