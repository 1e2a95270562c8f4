"""What the numbers of an evaluation mean, for a reader who has never seen them, in the order of their importance."""

# Metric of `jax_interp.evals` -> label, format, what it means and what is good.
NUMBERS = {
  'loss_recovered_mean': (
    'Loss recovered, against the mean',
    '{:.1%}',
    "The share of the damage done by using the mean activation that the SAE's reconstruction avoids. 100 % is as good "
    'as the real activations, 0 % is no better than the mean.',
  ),
  'loss_recovered_zero': (
    'Loss recovered, against zero',
    '{:.1%}',
    'The same against setting the activations to zero, which usually hurts the model more, so that the share is '
    'higher; most papers report this one.',
  ),
  'explained_variance': (
    'Explained variance',
    '{:.3f}',
    "The share of the activations' variance that the reconstruction keeps: 1 is perfect, 0 no better than the mean.",
  ),
  'normalized_mse': (
    'Normalized MSE',
    '{:.3f}',
    'Squared error over variance, both as the SAE sees its input (after normalization): 0 is perfect, 1 is no better '
    'than always answering the mean.',
  ),
  'normalized_mse_per_token': (
    'Normalized MSE, per token',
    '{:.3f}',
    "Each token's squared error over its squared length, then averaged, as OpenAI's released code counts it. Lower is "
    'better; it is not the same quantity as the one before.',
  ),
  'l0': (
    'L0',
    '{:.1f}',
    'Latents that are active at a token. Fewer are easier to read and reconstruct less: compare other numbers at the '
    'same L0.',
  ),
  'dead_latent_fraction': (
    'Dead latents',
    '{:.1%}',
    'Latents that are never active in the evaluated text: capacity that is not used. Near 0 % is good.',
  ),
  'kl_spliced': (
    'KL divergence, spliced',
    '{:.4f}',
    "How far the model's predictions move, in nats a token, when it runs on the reconstruction. 0 is no change.",
  ),
  'cross_entropy_increase': (
    'Loss increase, spliced',
    '{:.4f}',
    'Nats a token that the model loses when it runs on the reconstruction: close to 0 is good.',
  ),
  'cross_entropy_clean': (
    'Loss, clean',
    '{:.3f}',
    'The subject model as it is, in nats a token: the best to hope for.',
  ),
  'cross_entropy_spliced': ('Loss, spliced', '{:.3f}', 'With the reconstruction in place of the activations.'),
  'cross_entropy_mean_ablated': ('Loss, mean ablated', '{:.3f}', 'With the mean in place of the activations.'),
  'cross_entropy_zero_ablated': ('Loss, zero ablated', '{:.3f}', 'With zeros in place of the activations.'),
  'cosine': (
    'Cosine',
    '{:.3f}',
    'Mean cosine of the angle between activations and reconstructions: 1 is the same direction.',
  ),
  'l2_ratio': (
    'Length ratio',
    '{:.3f}',
    'Mean length of a reconstruction over that of its activation: below 1, reconstructions shrink.',
  ),
  'relative_bias': (
    'Relative bias',
    '{:.3f}',
    'Whether scaling the reconstructions would help: 1 when not, below 1 when they are too short.',
  ),
}
