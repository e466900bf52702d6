"""Chat templates in the formats of models that are used for real, each with its kind of tokenizer.

The formats are facts about those models; the templates are written anew and without tools. A
refusal of system turns or of roles that do not alternate is kept where the model's own has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import small_tokenizers as small
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
)
# Sets `system` and `turns` from the messages.
TAKE_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
)
TURNS = "{% for m in turns %}" + ALTERNATE
END = "{% endfor %}"


def chatml(default_system: str = "", start: str = "") -> str:
    default = (
        "{% if loop.first and m['role'] != 'system' %}"
        "{{ '<|im_start|>system\n" + default_system + "<|im_end|>\n' }}{% endif %}"
        if default_system
        else ""
    )
    return (
        start + "{% for m in messages %}" + default + "{{ '<|im_start|>' + m['role'] + '\n' "
        "+ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


LLAMA2 = (
    TAKE_SYSTEM + TURNS + "{% if loop.index0 == 0 and system %}"
    "{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}" + END
)
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>"
    "\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{{ bos_token + text if loop.index0 == 0 else text }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# 3.1 and later: a system turn with dates in front, whatever the messages are.
LLAMA31 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}"
    + TAKE_SYSTEM
    + "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: ' + date_string + '\n\n' + system | trim + '<|eot_id|>' }}"
    "{% for m in turns %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    + NO_SYSTEM
    + "{% for m in messages %}"
    + ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set thoughts = '' %}{% if '</think>' in text %}"
    "{% set thoughts = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{% set text = '<think>\n' + thoughts + '\n</think>\n\n' + text %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3's thinking-only models open the block themselves.
QWEN3_THINKING = QWEN3.replace(
    "'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}"
)
MISTRAL_V1 = (
    "{{ bos_token }}"
    + NO_SYSTEM
    + "{% for m in messages %}"
    + ALTERNATE
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
# v3 and later: [INST] is a token, and the system turn goes into the last user turn.
MISTRAL_V3 = (
    "{{ bos_token }}"
    + TAKE_SYSTEM
    + "{% set users = turns | selectattr('role', 'equalto', 'user') | list %}"
    + TURNS
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + (system + '\n\n' if system and m == users[-1] "
    "else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}" + END
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] "
    "+ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
VICUNA = (
    TAKE_SYSTEM + "{{ bos_token + (system if system else 'A chat between a curious user and an "
    "artificial intelligence assistant.') }}"
    + TURNS
    + "{% if m['role'] == 'user' %}{{ ' USER: ' + m['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}{% endif %}"
    + END
    + "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
DEEPSEEK_LLM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ 'User: ' + m['content'] + '\n\n' }}{% elif m['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + m['content'] + eos_token }}{% else %}{{ m['content'] + '\n\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
DEEPSEEK_R1 = (
    TAKE_SYSTEM + "{{ bos_token + system }}{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ '<｜User｜>' + m['content'] }}{% else %}{{ '<｜Assistant｜>' "
    "+ m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + "
    "{'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}"
    "[m['role']] + m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
COMMAND_A = COMMAND_R.replace(
    "m['content'].strip()",
    "('<|START_RESPONSE|>' + m['content'] + '<|END_RESPONSE|>' if m['role'] == 'assistant' "
    "else m['content'])",
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token + ('' if loop.last else '\n') }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
GRANITE = (
    TAKE_SYSTEM + "{{ '<|start_of_role|>system<|end_of_role|>' + (system if system else "
    "'You are Granite.') + '<|end_of_text|>\n' }}{% for m in turns %}"
    "{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
FALCON = (
    "{% for m in messages %}{{ '\n\n' if not loop.first else '' }}"
    "{{ {'system': '', 'user': 'User: ', 'assistant': 'Assistant: '}[m['role']] "
    "+ m['content'].replace('\n\n', '\n').strip() }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
OPENCHAT = (
    "{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m['role'].title() + ': ' "
    "+ m['content'] + '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)
GLM4 = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ALPACA = (
    TAKE_SYSTEM + "{{ system + '\n\n' if system else '' }}{% for m in turns %}"
    "{{ ('### Instruction:\n' if m['role'] == 'user' else '### Response:\n') "
    "+ m['content'] + (eos_token if m['role'] == 'assistant' else '') + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
# The end of turn is left out at the end of the chat, as in Qwen1.5.
QWEN15 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if not loop.last or add_generation_prompt %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] "
    "+ ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


@cache
def _trained(backend: Callable[[], Tokenizer]) -> str:
    return backend().to_str()


@dataclass(frozen=True)
class Family:
    """A template with the kind of tokenizer and the tokens of its models.

    end        the token that ends a response
    specials   the template's special tokens, besides BOS and EOS
    added      tokens that are added without being special
    rstrip     special tokens swallow the white space behind them, as in Phi-3
    """

    template: str
    backend: Callable[[], Tokenizer]
    bos: str
    eos: str
    end: str
    specials: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    rstrip: bool = False

    def tokenizer(self) -> PreTrainedTokenizerBase:
        backend = Tokenizer.from_str(_trained(self.backend))
        unk = {} if backend.token_to_id("<unk>") is None else {"unk_token": "<unk>"}
        tokenizer = small.PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=self.bos, eos_token=self.eos, **unk
        )
        tokens = [AddedToken(t, rstrip=self.rstrip, normalized=False) for t in self.specials]
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in self.added])
        tokenizer.chat_template = self.template
        return tokenizer


IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
THINK = ("<think>", "</think>")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
GPT, DIGITS, FIRST, LEGACY = small.byte_level_gpt2, small.digits, small.metaspace, small.legacy
TURN = ("<start_of_turn>", "<end_of_turn>")
COHERE = (
    "<|START_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
)
R1 = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
R1_ROLES = ("<｜User｜>", "<｜Assistant｜>")
TEXT, IM_END, S = "<|endoftext|>", "<|im_end|>", ("<s>", "</s>")

FAMILIES: dict[str, Family] = {
    "llama-2": Family(LLAMA2, LEGACY, *S, end="</s>"),
    "llama-3": Family(
        LLAMA3, DIGITS, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", HEADERS
    ),
    "llama-3.1": Family(LLAMA31, DIGITS, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", HEADERS),
    "gemma": Family(GEMMA, small.gemma_pieces, "<bos>", "<eos>", "<end_of_turn>", TURN),
    "gemma-3": Family(small.GEMMA, small.gemma_pieces, "<bos>", "<eos>", "<end_of_turn>", TURN),
    "qwen-1.5": Family(QWEN15, DIGITS, TEXT, TEXT, IM_END, IM),
    "qwen-2.5": Family(chatml(QWEN), DIGITS, TEXT, IM_END, IM_END, IM),
    "qwen-3": Family(QWEN3, DIGITS, TEXT, IM_END, IM_END, IM, THINK),
    "qwen-3-thinking": Family(QWEN3_THINKING, DIGITS, TEXT, IM_END, IM_END, IM, THINK),
    "mistral-v1": Family(MISTRAL_V1, LEGACY, *S, end="</s>"),
    "mistral-v3": Family(MISTRAL_V3, FIRST, *S, end="</s>", specials=("[INST]", "[/INST]")),
    "zephyr": Family(ZEPHYR, LEGACY, *S, end="</s>"),
    "tinyllama": Family(ZEPHYR, FIRST, *S, end="</s>"),
    "phi-3": Family(PHI3, LEGACY, "<s>", TEXT, "<|end|>", (*ROLES, "<|end|>"), rstrip=True),
    "phi-4": Family(PHI4, DIGITS, TEXT, TEXT, IM_END, (*IM, "<|im_sep|>")),
    "smollm2": Family(chatml(SMOLLM), GPT, "<|im_start|>", IM_END, IM_END, IM),
    "chatml": Family(chatml(), GPT, TEXT, TEXT, IM_END, IM),
    "chatml-only-added": Family(chatml(), GPT, TEXT, TEXT, IM_END, (), IM),
    "chatml-no-generation-prompt": Family(
        chatml().partition("{% if add_generation_prompt %}")[0], GPT, TEXT, TEXT, IM_END, IM
    ),
    "yi": Family(chatml(), FIRST, *S, IM_END, IM),
    "internlm-2": Family(chatml(start="{{ bos_token }}"), LEGACY, *S, IM_END, IM),
    "vicuna": Family(VICUNA, LEGACY, *S, end="</s>"),
    "deepseek-llm": Family(DEEPSEEK_LLM, DIGITS, *R1, end=R1[1]),
    "deepseek-r1": Family(DEEPSEEK_R1, DIGITS, *R1, R1[1], R1_ROLES, THINK),
    "command-r": Family(
        COMMAND_R, GPT, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", COHERE
    ),
    "command-a": Family(
        COMMAND_A,
        GPT,
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        (*COHERE, "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    "olmo-2": Family(OLMO2, GPT, TEXT, TEXT, TEXT, ROLES),
    "granite": Family(
        GRANITE,
        GPT,
        "<|end_of_text|>",
        "<|end_of_text|>",
        "<|end_of_text|>",
        ("<|start_of_role|>", "<|end_of_role|>"),
    ),
    "falcon-instruct": Family(FALCON, GPT, TEXT, TEXT, TEXT),
    "openchat": Family(OPENCHAT, LEGACY, *S, "<|end_of_turn|>", ("<|end_of_turn|>",)),
    "glm-4": Family(GLM4, GPT, TEXT, TEXT, TEXT, ("[gMASK]", "<sop>", *ROLES)),
    "alpaca": Family(ALPACA, small.metaspace_always, *S, end="</s>"),
    "alpaca-unigram": Family(ALPACA, small.unigram, *S, end="</s>"),
    "zephyr-prefix-space": Family(ZEPHYR, small.prefix_space, TEXT, TEXT, TEXT, ROLES),
    "harmony": Family(
        HARMONY,
        GPT,
        TEXT,
        "<|return|>",
        "<|return|>",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
    ),
}
