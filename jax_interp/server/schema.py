"""What the server is asked, and says, beside the debugger's requests and responses (`jax_interp.debugger.schema`)."""

from typing import Annotated, Literal

from pydantic import Field

from jax_interp.debugger.schema import Index, Site, Strict, Token

Kind = Literal['latent', 'neuron']
Text = Annotated[str, Field(min_length=1, max_length=1000)]


# The model


class SAEInfo(Strict):
  """A sparse autoencoder that is spliced in."""

  site: str = Field(description='What it reads and writes.')
  n_latents: int = Field(description='How many it has.')
  k: int | None = Field(description='Latents that are active on a token, at most; null where its kind sets no number.')
  normalization: str = Field(description='Of its input.')


class RecordsInfo(Strict):
  """Components of which there are records."""

  kind: Kind = Field(description='Of component.')
  site: str = Field(description='Where their activations are read.')
  n: int = Field(description='How many; they are numbered from 0.')
  n_explained: int = Field(description='Of how many there is an explanation.')


class Limits(Strict):
  """What a request may be."""

  body_bytes: int = Field(description='Size of a body; more is answered by 413.')
  prompt_tokens: int = Field(description='Tokens of each prompt of a request; more is answered by 422.')
  waiting: int = Field(description='Jobs that wait behind the one that runs; then 503, with Retry-After in seconds.')
  seconds: float = Field(description='How long a job may run, not counting that it waits; then 504.')


class ModelInfo(Strict):
  """What this server serves."""

  name: str = Field(description='What the model was loaded from.')
  family: str = Field(description="'gpt2' or 'llama'.")
  n_layer: int = Field(description='Layers.')
  n_head: int = Field(description='Of a layer.')
  d_model: int = Field(description='Channels of the residual stream.')
  n_neurons: int = Field(description='Of the MLP of a layer.')
  n_ctx: int = Field(description='Tokens that the model can read.')
  n_vocab: int = Field(description='Tokens of the vocabulary.')
  sites: list[str] = Field(description='Every named activation, in the order of the forward pass.')
  saes: list[SAEInfo] = Field(description='Those that are loaded.')
  other_model: str | None = Field(description="What right_model 'other' of /api/compare is; None: there is none.")
  has_sample: bool = Field(description="Whether ablations may hold at a 'mean' or a 'resample'.")
  records: list[RecordsInfo] = Field(description='What there are records of.')
  language_model: str | None = Field(description='What scores explanations that are typed; None: nothing does.')
  limits: Limits = Field(description='What a request may be.')


class TokenizeRequest(Strict):
  """A text that is to be cut into tokens."""

  text: str = Field(max_length=200_000, description='Special tokens in it, such as <|endoftext|>, are read as such.')


class TokenizeResponse(Strict):
  """The tokens of a text, as a prompt of the debugger is cut."""

  request: TokenizeRequest = Field(description='What was asked.')
  tokens: list[Token] = Field(description='A token that is part of a character reads as U+FFFD.')


# Components


class Excerpt(Strict):
  """A piece of text with the component's activation at each token."""

  tokens: list[str] = Field(description='Their texts.')
  activations: list[float] = Field(description='One a token.')


class Histogram(Strict):
  """How many tokens of the text that was recorded fall between two edges; inactive ones are not counted."""

  counts: list[int] = Field(description='Tokens in each range, the lowest first.')
  edges: list[float] = Field(description='One more than there are counts, from 0 to the largest activation.')


class Scores(Strict):
  """How well simulated activations s predict true ones y, over all tokens of all excerpts; None: not defined."""

  ev_correlation: float | None = Field(description='Pearson(y, s).')
  rsquared: float | None = Field(description='1 - mean((y - s)^2) / mean(y^2).')
  absolute_dev_explained: float | None = Field(description='1 - mean|y - s| / mean|y|.')


class OwnScores(Scores):
  """Scores on all excerpts, and on the random ones alone."""

  random_only: Scores | None = Field(description='On excerpts that were drawn at random; None: none was simulated.')


class Nulls(Strict):
  """What scores say of predictions that know nothing of the component."""

  other_explanation: Scores | None = Field(description='Simulated from the explanation of another component.')
  constant: Scores = Field(description='The mean activation everywhere.')


class Simulated(Strict):
  """An excerpt with the true activations and those simulated from an explanation alone."""

  split: Literal['top', 'random'] = Field(description='Of the most active excerpts, or of those drawn at random.')
  tokens: list[str] = Field(description='Their texts.')
  true: list[float] = Field(description="The component's activations.")
  simulated: list[float] = Field(description='Those predicted.')


class Explanation(Strict):
  """What a component looks for, by one method."""

  method: str = Field(description="'token_lookup', 'neuron2graph', 'token_activation' (a language model).")
  model: str | None = Field(description='The language model, if any.')
  simulator: str = Field(description='What predicted the activations from the explanation.')
  explanation: str = Field(description='In words.')
  status: str = Field(
    description="'ok'; or why there is no explanation or not all of the simulation: refused, truncated, parse_failed, "
    'failed.'
  )
  detail: str = Field(description='More about a status that is not ok.')
  scores: OwnScores | None = Field(description='On excerpts that the method has not seen; None: none was simulated.')
  nulls: Nulls = Field(description='What to compare the scores with.')
  sequences: list[Simulated] = Field(description='Excerpts it was scored on.')


class Component(Strict):
  """A latent or neuron: when it is active, and what it is said to look for."""

  kind: Kind = Field(description='Latent of an SAE, or neuron of an MLP.')
  site: str = Field(description='Where its activations are read.')
  index: int = Field(description='Its number at the site.')
  density: float = Field(description='Share of tokens where it is active.')
  max: float = Field(description='Largest activation.')
  mean: float | None = Field(description='Of its activation over tokens, as are the moments below.')
  variance: float | None = Field(description='Population variance.')
  skewness: float | None = Field(description='0 for a symmetric distribution; None: it is constant.')
  kurtosis: float | None = Field(description='3 for a normal distribution.')
  histogram: Histogram = Field(description='Of its activations.')
  promoted: list[str] = Field(description='Tokens whose logits it raises most, by its write vector alone.')
  suppressed: list[str] = Field(description='Tokens whose logits it lowers most.')
  quantile_boundaries: list[float] = Field(description="Of the maximum of a window of text; see 'quantiles'.")
  top: list[Excerpt] = Field(description='Where it is most active, the largest maximum first.')
  random: list[Excerpt] = Field(description='Drawn from all other text.')
  quantiles: list[list[Excerpt]] = Field(description='Drawn between two neighbours of quantile_boundaries each.')
  explanations: list[Explanation] = Field(description='By every method that was run.')


class Found(Strict):
  """An explanation that was searched for."""

  kind: Kind = Field(description='Of component.')
  site: str = Field(description='Where it is read.')
  index: int = Field(description='Its number at the site.')
  method: str = Field(description='That explained it.')
  explanation: str = Field(description='In words.')
  score: float | None = Field(description='Its ev_correlation, if defined.')


class SearchResponse(Strict):
  """Explanations that have all the words, the best match first (BM25)."""

  q: str = Field(description='What was asked.')
  limit: int = Field(description='How many were asked for at most.')
  found: list[Found] = Field(description='The best match first.')
  n: int = Field(description='How many there are in all; found holds the first of them.')


# Scoring what a user types


class EstimateRequest(Strict):
  """An explanation in the user's words."""

  kind: Kind = Field(description='Of component.')
  site: Site = Field(description='Where it is read.')
  index: Index = Field(description='Its number at the site.')
  explanation: Text = Field(description='What the component looks for.')


class Estimate(Strict):
  """What it would take to score an explanation. Nothing has been asked of the language model yet."""

  request: EstimateRequest = Field(description='What was asked.')
  id: str = Field(description='What /api/score is to be given: once, and before it expires.')
  expires_in: float = Field(description='Seconds.')
  model: str = Field(description='The language model that would simulate.')
  simulator: str = Field(description="'all_at_once' (by log-probabilities) or 'json'.")
  excerpts: int = Field(description='Excerpts that would be simulated.')
  requests: int = Field(description='To the language model; what it was asked before is remembered.')
  prompt_tokens: int = Field(description='About how many, rather too many.')
  completion_tokens: int = Field(description='At most.')
  usd: float | None = Field(description='Cost, at most; 0 for a model on this machine; None: its price is not known.')
  usd_left: float = Field(description="What is left of the server's budget before this.")


class ScoreRequest(Strict):
  """Asks for what was estimated."""

  id: Annotated[str, Field(min_length=1, max_length=100, description='Of the estimate.')]


class ScoreResponse(Strict):
  """How well an explanation predicts the component."""

  request: EstimateRequest = Field(description='What was estimated.')
  model: str = Field(description='The language model that simulated.')
  simulator: str = Field(description="'all_at_once' (by log-probabilities) or 'json'.")
  scores: OwnScores | None = Field(description='None: no excerpt could be simulated.')
  statuses: dict[str, int] = Field(
    description="Excerpts of each status: 'ok', refused, truncated, parse_failed, failed."
  )
  sequences: list[Simulated] = Field(description='Excerpts that could be simulated.')


# Jobs


class Queued(Strict):
  """Event 'queued': the job waits."""

  id: str = Field(description='Of the job; the header X-Job-Id of answers that are no stream.')
  position: int = Field(description='Jobs before this one, the running one included.')


class Progressed(Strict):
  """Event 'progress': the job runs."""

  id: str = Field(description='Of the job.')
  fraction: float = Field(description='The share that is done, from 0 to 1.')
  what: str = Field(description='What is being done.')
