"""What may be asked of the debugger, and what it answers: the same objects in Python and, as JSON, over HTTP.

Conventions, for all of them. Tokens are numbered from 0, and from the end by negative numbers. Effects are positive
where a node pushes the objective up. What is None is not defined for that node, never zero. Every answer carries the
request it is an answer to, so that it can be asked again.
"""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

TokenText = Annotated[str, Field(max_length=200)]
Position = Annotated[int, Field(ge=-(2**20), le=2**20)]
Index = Annotated[int, Field(ge=0, le=2**31 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]  # whose squares float32 can sum
Site = Annotated[str, Field(max_length=100)]
Prompt = Annotated[str, Field(min_length=1, max_length=200_000)]


class Strict(pydantic.BaseModel):
  """A frozen object that refuses fields it does not know."""

  model_config = pydantic.ConfigDict(extra='forbid', frozen=True)


WHERE = {  # the fields that say where a node of each kind is
  'embedding': ('token',),
  'head': ('token', 'source', 'layer', 'index'),
  'head_token': ('token', 'layer', 'index'),
  'neuron': ('token', 'layer', 'index'),
  'latent': ('token', 'index', 'site'),
  'bias': ('token', 'layer', 'index', 'site'),  # the index of a head's own, of site 'q' or 'k'
  'error': ('token', 'site'),
  'head_total': ('layer', 'index'),
  'layer': ('token', 'layer', 'site'),
}


def _has_no_other_place(asked, where=WHERE):
  """Refuses what says where a node is, but not one of its kind: it would be read as another, or listed twice."""
  for name in ('token', 'source', 'layer', 'index', 'site'):
    if getattr(asked, name, None) is not None and name not in where[asked.kind]:
      raise ValueError(f'{name} is no part of where a node of kind {asked.kind} is; leave it out')
  return asked


class Node(Strict):
  """A component at one token, or token pair, of a prompt."""

  kind: Literal[tuple(WHERE)] = Field(
    description='embedding: of a token. head: an attention head at a token pair. head_token: a head at a token, summed '
    'over what it attends to. neuron: of an MLP. latent: of an SAE. error: what an SAE does not reconstruct. bias: an '
    "output bias, of no other node; an SAE's pre-bias. head_total: a head, summed over all tokens. layer: all that the "
    'attention or the MLP of a layer adds to a token.'
  )
  token: Position | None = Field(None, description='The token the node writes to (the query, for a head). None: all.')
  source: Position | None = Field(None, description='head only: the token attended to (the key).')
  layer: Index | None = Field(None, description='None for embedding, latent and error.')
  index: Index | None = Field(None, description='Number of the head, neuron or latent.')
  site: Site | None = Field(
    None, description="latent, error, and an SAE's bias: the site it is spliced into. bias, layer: 'attn' or 'mlp'."
  )

  _place = pydantic.model_validator(mode='after')(_has_no_other_place)

  @property
  def label(self) -> str:
    """A short name, such as `h.5.attn.3 7<-2`."""
    where = {
      'embedding': 'embedding',
      'head': f'h.{self.layer}.attn.{self.index}',
      'head_token': f'h.{self.layer}.attn.{self.index}',
      'head_total': f'h.{self.layer}.attn.{self.index}',
      'neuron': f'h.{self.layer}.mlp.{self.index}',
      'latent': f'{self.site}.{self.index}',
      'error': f'{self.site}.error',
      'bias': f'h.{self.layer}.{self.site}.bias' if self.layer is not None else f'{self.site}.bias',
      'layer': f'h.{self.layer}.{self.site}',
    }[self.kind]
    at = '' if self.token is None else f' {self.token}'
    return where + at + ('' if self.source is None else f'<-{self.source}')


# Objectives


class LogitDifference(Strict):
  """Mean logit of the targets minus mean logit of the distractors, if there are any, at a token."""

  kind: Literal['logit_difference'] = 'logit_difference'
  targets: list[TokenText] = Field(min_length=1, max_length=16, description='Texts of exactly one token each.')
  distractors: list[TokenText] = Field([], max_length=16, description='Texts of exactly one token each.')
  token: Position = Field(-1, description='Where the next token is read.')


class LogProbability(Strict):
  """Mean log-probability of the targets at a token, in nats."""

  kind: Literal['log_probability'] = 'log_probability'
  targets: list[TokenText] = Field(min_length=1, max_length=16, description='Texts of exactly one token each.')
  token: Position = Field(-1, description='Where the next token is read.')


class Continuation(Strict):
  """Log-probability, in nats, of a text of up to 16 tokens behind the prompt; the tokens join the prompt."""

  kind: Literal['continuation'] = 'continuation'
  text: Annotated[str, Field(min_length=1, max_length=1000)] = Field(description='Read as it stands behind the prompt.')


class KL(Strict):
  """KL divergence, in nats, of the next-token distribution of the run from that of the same run without ablations."""

  kind: Literal['kl'] = 'kl'
  token: Position = Field(-1, description='Where the next token is read.')


class Entropy(Strict):
  """Entropy of the next-token distribution, in nats."""

  kind: Literal['entropy'] = 'entropy'
  token: Position = Field(-1, description='Where the next token is read.')


class Projection(Strict):
  """The residual stream at a site and token, projected on a direction (not normalized)."""

  kind: Literal['projection'] = 'projection'
  site: Site = Field(description="'resid.post_emb', or 'h.5.resid.post_attn', 'h.5.resid.post_mlp'.")
  token: Position = Field(-1, description='Where it is read.')
  direction: list[Number] = Field(min_length=1, max_length=65536, description='d_model numbers.')


class PreActivation(Strict):
  """The pre-activation of a neuron or latent: what a trace upstream of it explains."""

  kind: Literal['pre_activation'] = 'pre_activation'
  node: Node = Field(description='A neuron or latent at a token.')


class AttentionLogit(Strict):
  """The attention logit q k / sqrt(channels) of a head at a token pair."""

  kind: Literal['attention_logit'] = 'attention_logit'
  node: Node = Field(description='A head at a token pair.')
  through: Literal['q', 'k', 'qk'] = Field('qk', description='What may vary: queries, keys or both.')


Read = Annotated[
  LogitDifference | LogProbability | Continuation | KL | Entropy | Projection | PreActivation | AttentionLogit,
  Field(discriminator='kind'),
]


class HeadWrite(Strict):
  """What a head moves from one token to another, projected on the direction that `of` reads there."""

  kind: Literal['head_write'] = 'head_write'
  node: Node = Field(description='A head at a token pair.')
  through: Literal['v', 'all'] = Field('v', description='v: the attention is held. all: queries and keys vary too.')
  of: Read = Field(description='What the head writes for.')


Objective = Annotated[Read | HeadWrite, Field(discriminator='kind')]


class Trace(Strict):
  """Explains a node in place of the objective: what upstream makes it do what it does."""

  node: Node = Field(description='A head at a token pair, a neuron or a latent.')
  through: Literal['q', 'k', 'qk', 'v', 'all'] | None = Field(
    None, description='Of a head: queries, keys, both, values, or all. None for neurons and latents.'
  )
  downstream: 'Trace | None' = Field(
    None, description="Through v or all: the node that the head's write is read by; None: the request's objective."
  )

  @pydantic.model_validator(mode='after')
  def _is_shallow(self):
    if self.downstream is not None and self.downstream.downstream is not None:
      raise ValueError('what is downstream of a head is traced as a whole; leave its own downstream out')
    return self


# Ablations


class Value(Strict):
  """Holds at a number."""

  kind: Literal['value'] = 'value'
  value: Number = Field(0.0, description='In the units of the activation.')


class Mean(Strict):
  """Holds at the mean over the tokens of the server's sample of text."""

  kind: Literal['mean'] = 'mean'


class OtherPrompt(Strict):
  """Holds at the value, token by token, of a run on another prompt; as many tokens or more."""

  kind: Literal['prompt'] = 'prompt'
  prompt: Prompt = Field(description='Text; tokens behind the length of the prompt are not used.')


class Resample(Strict):
  """Holds at the value of a run on a window drawn from the server's sample of text."""

  kind: Literal['resample'] = 'resample'
  seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(0, description='Chooses the window.')


Held = Annotated[Value | Mean | OtherPrompt | Resample, Field(discriminator='kind')]


HELD = {'head': ('layer', 'index', 'source'), 'neuron': ('layer', 'index'), 'latent': ('site', 'index')}  # as WHERE
HELD |= {'embedding': (), 'attn': ('layer',), 'mlp': ('layer',)}


class Ablation(Strict):
  """Holds components at a value; later ablations of a request win over earlier ones.

  Of a head, a number replaces its attention pattern (0 switches it off: what it attends to is not renormalized); a
  mean and a value of another run replace what it reads, before its output matrix. Given a source, all of them act on
  the pattern at that token pair. A layer that is held hides what is done to its heads and neurons; a head whose
  reading is held hides what is done to single pairs.
  """

  kind: Literal[tuple(HELD)]
  layer: Index | None = Field(None, description='None for embedding and latent.')
  site: Site | None = Field(None, description='latent only: the site of its SAE.')
  index: Index | None = Field(None, description='Of the head, neuron or latent; None: all of the layer or site.')
  first: Position = Field(0, description='The first token that is ablated.')
  last: Position = Field(-1, description='The last token that is ablated.')
  source: Position | None = Field(None, description='head only: this token pair alone; None: all sources.')
  to: Held = Field(Value(), description='What it is held at.')

  @pydantic.model_validator(mode='after')
  def _place(self):
    return _has_no_other_place(self, HELD)


class EdgeAblation(Strict):
  """Takes what a node writes out of what the queries, keys or values of one head read; the norm sees the change."""

  node: Node = Field(description='An embedding, head, neuron, latent, or the layer it is in, upstream of the head.')
  layer: Index = Field(description='Of the head that reads.')
  head: Index = Field(description='That reads; heads that share keys and values read them together.')
  into: Literal['q', 'k', 'v'] = Field(description='Queries, keys or values.')


# Asking for one run


class Request(Strict):
  """A prompt, what is to be explained, and what is changed."""

  prompt: Prompt = Field(description='Text; special tokens in it, such as <|endoftext|>, are read as such.')
  objective: Objective = Field(description='The number that is explained, unless a trace is asked for.')
  trace: Trace | None = Field(None, description='Explains a node instead.')
  ablations: list[Ablation] = Field([], max_length=16, description='What is held, in order.')
  edge_ablations: list[EdgeAblation] = Field([], max_length=8, description='Edges that are cut.')
  saes: list[Site] | None = Field(None, max_length=64, description='Sites whose SAEs are spliced in; None: all.')
  k: int = Field(10, ge=1, le=100, description='Nodes listed of each kind: top and bottom by each column.')
  nodes: list[Node] = Field([], max_length=1000, description='Listed whatever their effects.')
  n_tokens: int = Field(10, ge=0, le=100, description='Tokens listed that a node promotes, suppresses, is excited by.')


class Token(Strict):
  """A token of the vocabulary."""

  id: int = Field(description='Its number.')
  text: str = Field(description='What it spells; part of a character comes as a replacement character.')


class Tokens(Strict):
  """Tokens with a number each, the largest first."""

  tokens: list[Token] = Field(description='Of the vocabulary.')
  values: list[float] = Field(description='One for each.')


class Table(Strict):
  """One column a field, one row a node; see `Node` for what is summed in aggregates."""

  nodes: list[Node] = Field(description='The rows.')
  activation: list[float | None] = Field(
    description="A neuron's or latent's activation, a head's attention probability, 1 for an embedding."
  )
  write_norm: list[float | None] = Field(
    description='Size of what the node writes to the residual stream; negative where a neuron is.'
  )
  direct_effect: list[float | None] = Field(
    description='Write vector times the gradient of the objective at the residual stream that it is read from, with '
    "the norm's scale held."
  )
  total_effect: list[float | None] = Field(
    description='Estimated: activation times the gradient of the objective through everything downstream.'
  )


class Completeness(Strict):
  """The sum of all direct effects against the objective."""

  objective: float = Field(description='Of the run.')
  embedding: float = Field(description='All embedded tokens.')
  attention: float = Field(description='All heads.')
  mlp: float = Field(description='All neurons of layers without an SAE at their MLP.')
  latents: float = Field(description='All latents of the SAEs that stand for something.')
  errors: float = Field(description='What the SAEs do not reconstruct.')
  biases: float = Field(description='Output biases of attention and MLPs, pre-biases of SAEs.')
  final_bias: float = Field(description='What the last norm and the reader add whatever the residual stream is.')
  residual: float = Field(description='objective minus the sum of the others.')
  exact: bool = Field(
    description='Whether the objective is linear in the residual stream it is read from, with the scale of the norm '
    'held, so that the residual is rounding; else it is what the gradient misses.'
  )


class ByToken(Strict):
  """Estimated total effects summed over layers and components, one number a token of the prompt."""

  embedding: list[float] = Field(description='Of the embedded token.')
  attention_to: list[float] = Field(description='Of heads, at the token that attends (query).')
  attention_from: list[float] = Field(description='Of pairs of heads, at the token attended to (key).')
  mlp: list[float] = Field(description='Of neurons, also where an SAE stands for them.')
  latents: list[float] = Field(description='Of the latents of all SAEs.')


class Candidates(Strict):
  """Next tokens at the token that the objective is about; targets and distractors first."""

  token: int = Field(description='Of the prompt, behind which they would come.')
  tokens: list[Token] = Field(description='Of the vocabulary.')
  logits: list[float] = Field(description='One for each.')
  probabilities: list[float] = Field(description='Of all tokens of the vocabulary.')
  ranks: list[int] = Field(description='From 0, the most probable.')


class NodeTokens(Strict):
  """What a row of the table has to do with tokens of the vocabulary."""

  node: int = Field(description='Row of the table.')
  promoted: Tokens = Field(
    description='Logits that the write vector adds, through the gain of the final norm and the unembedding, minus '
    'their mean over the vocabulary; not divided by the scale.'
  )
  suppressed: Tokens = Field(description='The same, smallest first.')
  excited_by: Tokens | None = Field(
    description='Of neurons, and latents of MLPs: embeddings of tokens times the gradient of the pre-activation at '
    "the layer's input. Largest."
  )
  inhibited_by: Tokens | None = Field(None, description='The same, smallest first.')
  attributed_to: list[int] | None = Field(
    None, description='Of latents of attention output: the tokens of the prompt that its value comes from, most first.'
  )
  attributions: list[float] | None = Field(None, description="Each token's part of the pre-activation.")


class Response(Strict):
  """The answer to a `Request`."""

  request: Request
  tokens: list[Token] = Field(description='Of the prompt, and of the continuation where there is one.')
  objective: float = Field(description='What is explained; with a trace, that of the node.')
  unedited: float | None = Field(description='The same objective without ablations; None where there are none.')
  traced_activation: float | None = Field(description="The traced node's pre-activation.")
  table: Table = Field(description='Nodes and their effects.')
  completeness: Completeness = Field(description='Whether direct effects add up to the objective.')
  by_token: ByToken = Field(description='Effects summed for each token of the prompt.')
  candidates: Candidates = Field(description='What may come next.')
  node_tokens: list[NodeTokens] = Field(description='One for each row of the table; none if n_tokens is 0.')
  seconds: float = Field(description='That the answer took.')


# Asking for more


class CompareRequest(Strict):
  """Two runs over one list of nodes; without a right one, the left of the other model, or without its ablations."""

  left: Request = Field(description='The run that is compared.')
  right: Request | None = Field(None, description='What it is compared with.')
  right_model: Literal['main', 'other'] = Field('main', description='The second model, where one is served.')


class CompareResponse(Strict):
  """Rows of left.table, right.table and difference are the same nodes; difference is left minus right."""

  request: CompareRequest
  left: Response = Field(description='Answer to the left request, over the nodes of both.')
  right: Response = Field(description='Answer to the right request.')
  difference: Table = Field(description='Left minus right.')


class AuditRequest(Strict):
  """Really ablates nodes to zero, one at a time, and compares with the estimate.

  Nodes that the request names are audited first: embeddings, heads at a token pair or at a token, neurons, latents, and
  layers. The others are not heads at a token or layers, which are sums of nodes.
  """

  request: Request
  n: int = Field(50, ge=1, le=500, description='Nodes: those of the largest estimated total effects.')
  steps: int = Field(
    4, ge=0, le=32, description='Points of the integrated gradient of each node from zero to its value; 0: none.'
  )


class AuditResponse(Strict):
  """One row a node; the effect of a node is the objective minus the objective without the node."""

  request: AuditRequest
  tokens: list[Token] = Field(description='Of the prompt.')
  objective: float = Field(description='Without any of these ablations.')
  nodes: list[Node] = Field(description='The rows.')
  estimated: list[float] = Field(description='Total effects, as in the table of the request.')
  measured: list[float] = Field(description='What the objective loses by the ablation.')
  ratio: list[float | None] = Field(description='estimated / measured; None where measured is zero.')
  integrated: list[float] | None = Field(description='Activation times the gradient averaged from zero to it.')


class EdgesRequest(Strict):
  """The edges into a node, out of it, or the one between two: through a write and a read, with nothing between.

  They are those of the run as it is edited: what is held reads nothing, and what is lost has no edges.
  """

  request: Request
  from_node: Node | None = Field(None, description='An embedding, head, neuron, latent, error, bias or layer.')
  to_node: Node | None = Field(None, description='A head at a token pair, a neuron or a latent.')
  through: Literal['q', 'k', 'v'] | None = Field(None, description='Which input of to_node, where it is a head.')
  frozen: bool = Field(
    True, description="Whether the scale of the reader's norm is held; of a latent, that of its SAE's input too."
  )
  n: int = Field(50, ge=1, le=1000, description='Edges that are listed, the largest of either sign.')


class EdgesResponse(Strict):
  """One row an edge.

  Its effect is the derivative of the reader's activation along the writer's write vector, times the derivative of the
  objective by that activation. Edges into a node are those of the nodes in the table of a trace of it, `request.k`
  each.
  """

  request: EdgesRequest
  tokens: list[Token] = Field(description='Of the prompt.')
  from_nodes: list[Node] = Field(description='Who writes.')
  to_nodes: list[Node] = Field(description='Who reads.')
  through: list[Literal['q', 'k', 'v'] | None] = Field(description='Which input of a head reads.')
  effects: list[float] = Field(description='On the objective, through this edge.')
  objective: float = Field(description='Of the request.')


class QKRequest(Strict):
  """Splits the attention logit of a head at a token pair into pairs of upstream nodes."""

  request: Request
  layer: Index = Field(description='Of the head.')
  head: Index = Field(description='Its number in the layer.')
  token: Position = Field(description='That attends (the query).')
  source: Position = Field(description='That is attended to (the key).')
  n: int = Field(50, ge=1, le=1000, description='Pairs listed, the largest of either sign.')


class QKSide(Strict):
  """All that the query, or the key, is made of at its token; heads are summed over what they attend to."""

  nodes: list[Node] = Field(
    description="A bias of site 'q' or 'k' stands for what the norm's shift and the head's own bias give."
  )
  effects: list[float] = Field(description='With all of the other side.')


class QKResponse(Strict):
  """One row a pair: what its query-side and its key-side node contribute to the logit together."""

  request: QKRequest
  tokens: list[Token] = Field(description='Of the prompt.')
  logit: float = Field(description='Query times key, divided by the square root of the channels.')
  probability: float = Field(description='What the softmax makes of it.')
  query_nodes: list[Node] = Field(description='At the token that attends.')
  key_nodes: list[Node] = Field(description='At the token attended to.')
  effects: list[float] = Field(description='Parts of the logit.')
  query: QKSide = Field(description='All of the query.')
  key: QKSide = Field(description='All of the key.')
  residual: float = Field(description='The logit minus the sum of all pairs.')


class CircuitRequest(Strict):
  """Finds a small circuit: edges between heads and MLPs that carry the objective."""

  request: Request
  counterfactual: Held = Field(
    Value(),
    description='What cut edges carry: nothing (of numbers, 0 alone), or what is written in the mean or in '
    'another run.',
  )
  n_edges: int = Field(50, ge=1, le=100_000, description='The circuit has at most as many edges.')
  steps: int = Field(
    5, ge=1, le=32, description='Points of the integrated gradients; 1: the gradient at the prompt itself.'
  )
  minimality: bool = Field(True, description='Whether the edges, the first 300 of them, are cut in turn.')


class Edge(Strict):
  """From what a component writes to what another reads, at all tokens."""

  writer: str = Field(description="'embedding', 'h.3.attn.5', 'h.3.mlp'.")
  reader: str = Field(
    description="'h.4.attn.2.q', '.k', '.v', 'h.4.mlp', 'logits'; heads that share keys and values count as one in .k "
    "and .v; 'objective' where that is read from the residual stream."
  )
  score: float = Field(description='Integrated gradient: estimated effect of the edge.')
  measured: float | None = Field(
    description='What the objective loses when the edge is cut from the circuit. None: not measured.'
  )


class CircuitResponse(Strict):
  """A circuit and how well it stands in for the model, all by real ablation."""

  request: CircuitRequest
  tokens: list[Token] = Field(description='Of the prompt.')
  edges: list[Edge] = Field(description='The largest score, by size, first.')
  n_possible: int = Field(description='Edges on some path from the embedding to the objective.')
  full: float = Field(description='Objective of the model.')
  empty: float = Field(description='Objective with all edges cut.')
  circuit: float = Field(description='Objective with all edges outside of the circuit cut.')
  complement: float = Field(description='Objective with the edges of the circuit cut.')
  faithfulness: float | None = Field(description='(circuit - empty) / (full - empty); None where they are equal.')
  completeness: float | None = Field(
    description='(full - complement) / (full - empty): 1 if nothing is left without it.'
  )
  minimality: float | None = Field(
    description='The smallest share of full - empty that is lost, by size, when one measured edge is cut.'
  )


class TemplateRequest(Strict):
  """One question over many prompts: nodes are matched by position and averaged."""

  requests: list[Request] = Field(min_length=2, max_length=200, description='Prompts of one length in tokens.')


class TemplateResponse(Strict):
  """Means over the prompts, and 95 % intervals of the means (bootstrap)."""

  request: TemplateRequest
  objective: list[float] = Field(description='Of each prompt.')
  nodes: list[Node] = Field(description='All that are in the table of any prompt.')
  direct_effect: list[float] = Field(description='Mean over the prompts.')
  direct_low: list[float] = Field(description='Lower end of the interval of the mean.')
  direct_high: list[float] = Field(description='Upper end.')
  total_effect: list[float] = Field(description='Mean over the prompts.')
  total_low: list[float] = Field(description='Lower end of the interval of the mean.')
  total_high: list[float] = Field(description='Upper end.')


class Steering(Strict):
  """Adds a multiple of a latent's or neuron's write vector, or of a direction, to a residual-stream site."""

  site: Site = Field(description='A residual stream, as of a projection.')
  node: Node | None = Field(None, description='A neuron or latent; its token is not used.')
  direction: list[Number] | None = Field(None, max_length=65536, description='d_model numbers, in place of a node.')
  coefficient: Number = Field(description='Of the write vector of an activation of 1, or of the direction.')


class GenerateRequest(Strict):
  """Continues a prompt with and without edits, with the same random numbers."""

  prompt: Prompt = Field(description='Text to continue.')
  ablations: list[Ablation] = Field([], max_length=16, description='At all tokens from `first` on if last is -1.')
  steering: list[Steering] = Field([], max_length=16, description='Added at all tokens.')
  n_new: int = Field(32, ge=1, le=512, description='Tokens to append, at most.')
  temperature: float = Field(0.0, ge=0, le=10, description='0: the most probable token.')
  top_p: float = Field(1.0, gt=0, le=1, description='Draws from the nucleus of this probability.')
  seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(0, description='Of the random numbers of both texts.')


class GenerateResponse(Strict):
  """Both texts, token by token."""

  request: GenerateRequest
  prompt: list[Token] = Field(description='As it is tokenized.')
  edited: list[Token] = Field(description='New tokens under the edits.')
  baseline: list[Token] = Field(description='New tokens without.')


class LensRequest(Strict):
  """The logit lens on a component, without a prompt."""

  kind: Literal['neuron', 'latent'] = Field(description='Of the component.')
  layer: Index | None = Field(None, description='None for a latent.')
  site: Site | None = Field(None, description='latent only: the site of its SAE.')
  index: Index = Field(description='Of the component.')
  n: int = Field(20, ge=1, le=100, description='Tokens of each list.')

  _place = pydantic.model_validator(mode='after')(_has_no_other_place)


class LensResponse(Strict):
  """Output side: what an activation of 1 adds to each logit. Input side: the pre-activation of each token alone."""

  request: LensRequest
  promoted: Tokens = Field(description='Minus the mean over the vocabulary; the largest first.')
  suppressed: Tokens = Field(description='The same, the smallest first.')
  excited_by: Tokens | None = Field(description='Pre-activations, the largest first; None unless of an MLP.')
  inhibited_by: Tokens | None = Field(description='The same, the smallest first.')


class ActsRequest(Strict):
  """Activations of one component on a prompt."""

  prompt: Prompt = Field(description='Text.')
  kind: Literal['head', 'neuron', 'latent'] = Field(description='Of the component.')
  layer: Index | None = Field(None, description='None for a latent.')
  site: Site | None = Field(None, description='latent only: the site of its SAE.')
  index: Index = Field(description='Of the component.')

  _place = pydantic.model_validator(mode='after')(_has_no_other_place)


class ActsResponse(Strict):
  """values[t] of a neuron or latent; of a head, values[t][s]: attention times the size of what it writes."""

  request: ActsRequest
  tokens: list[Token] = Field(description='Of the prompt.')
  values: list[float] | list[list[float]] = Field(description='One for each token, or list of one for each source.')
