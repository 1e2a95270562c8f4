"""A transcoder on the tiny pipeline: TopK latents that read what an MLP reads, and write what it adds to the stream."""

from configs import tiny


def get_config():
  config = tiny.get_config()
  config.capture.sites = ('h.2.resid.post_attn', 'h.2.resid.delta_mlp')
  config.sae.site, config.sae.target_site = config.capture.sites
  config.sae.normalization = 'expected_average'
  config.sae.skip = False  # a linear connection past the latents
  return config
