"""Questions that come second in a conversation: the prompt holds the first one, answered, and no thinking."""

from shoal.rl.rollout import Prompter, SecondQuestion
from shoal.rl.tasks.task import Problem
from shoal.text.chat_template import ChatTemplate
from shoal.text.tokenizer import Tokenizer


def test_the_first_question_and_its_answer_stand_before_the_second():
    tokenizer = Tokenizer.train(["Tom has 3 apples, finds 4. How many? 7"] * 20, 320)
    plain = Prompter(tokenizer, ChatTemplate.default(tokenizer))
    first = Problem(family="chain_sum", difficulty=1, prompt="Tom has 3. How many?", answer="3")
    second = Problem(family="chain_sum", difficulty=1, prompt="Tom finds 4. How many?", answer="7")
    text = tokenizer.decode(list(SecondQuestion(plain, [first]).prompt_ids(second)), skip_special=False)
    alone = tokenizer.decode(list(plain.prompt_ids(second)), skip_special=False)
    assert "<think>" not in text
    assert text.index("Tom has 3. How many?") < text.index("Tom finds 4. How many?")
    assert text.endswith(alone.removeprefix(tokenizer.decode([tokenizer.bos_token_id], skip_special=False)))
    assert SecondQuestion(plain, [first], share=0.0).prompt_ids(second) == plain.prompt_ids(second)
