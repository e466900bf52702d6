"""Every setting of every stage: frozen dataclasses, filled from YAML, dotted flags and defaults.

The doc comment under a field is its `--help` text, its type holds its bounds (bounds.py); what
concerns several settings is in validation.py. Nothing here imports torch, so that a wrong key or
type is reported before anything heavy starts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from s2srm.bounds import Bounds, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

DecayRate = Annotated[float, Bounds(0, below=1)]
Precision = Literal["float32", "float64", "bfloat16"]
RewardKind = Literal["seq2seq", "scalar"]
DataFormat = Literal[
    "auto", "columns", "pku_saferlhf", "anthropic_hh", "tldr_comparisons", "ultrafeedback"
]


@dataclass(frozen=True)
class ModelConfig:
    """A causal language model in Hugging Face layout."""

    path: str = ""
    """Folder or hub name, as from_pretrained takes it; ~ is the home folder."""
    precision: Precision = "float32"
    """Floating-point type of the weights; bfloat16 is meant for GPUs."""
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    """flash: the FlashAttention varlen kernels (GPU); sdpa: torch's own; auto: flash if it can."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass."""
    trust_remote_code: bool = False
    """Allow Python code that comes with the model to run."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.path.expanduser(self.path))


@dataclass(frozen=True)
class DataConfig:
    """Preference triples (prompt, chosen, rejected), or prompts alone for PPO."""

    path: str = ""
    """A .jsonl, .json (also .gz, .bz2, .xz, .zst), .parquet or .arrow file, a folder of them or one
    from save_to_disk, or a hub name."""
    split: str = "train"
    """Which split of a hub data set or of a folder with train/dev/test files or sub-folders; files
    such as train_prefs go by their own name as well."""
    subset: str | None = None
    """Configuration name of a hub data set (what load_dataset calls `name`)."""
    format: DataFormat = "auto"
    """Adapter for the columns; auto recognises them by name and by what they hold."""
    columns: dict[str, str] = field(default_factory=dict)
    """Which column holds prompt, chosen, rejected (or response for sft); also system, history and
    input, which belong to the prompt (an empty name reads none), and pku_saferlhf's preference."""
    prompt_in_response: Literal["refuse", "strip", "keep"] = "refuse"
    """Where most responses begin with the whole prompt: stop, take it out of them, or leave it."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that is broken: stop with file, line and reason, or skip it and count it."""
    on_long_row: Literal["error", "skip"] = "error"
    """A prompt or response over its limit of tokens: stop, or skip it and count it."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest prompt, in tokens."""
    max_response_tokens: PositiveInt = 1024
    """Longest response, in tokens, end of sequence included."""
    limit: PositiveInt | None = None
    """Use the first so many good rows; null uses all."""


@dataclass(frozen=True)
class TemplateConfig:
    """How prompt, response and correction are written down as tokens."""

    kind: Literal["auto", "plain", "chat"] = "auto"
    """chat: the tokenizer's chat template; plain: text as it is; auto: chat if there is one."""
    separator: str | None = None
    """Plain: text between response and correction. Chat: the user turn asking for a correction."""
    chat_name: str | None = None
    """Which one of a tokenizer's named chat templates to use; null: its default."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd without momentum."""
    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon. It must lie below the gradients (docs/settings.md): clipped to a norm of 1,
    those of 2.5 billion weights have a root mean square of 2e-5, later ones less."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay on matrices; vectors and scalars have none."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay after the warm-up; linear and cosine end at 0."""
    warmup_steps: NonNegativeInt = 0
    """Optimiser steps of linear warm-up."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0 does not clip."""


@dataclass(frozen=True)
class EngineConfig:
    """What runs the training step."""

    kind: Literal["auto", "torch", "deepspeed"] = "auto"
    """torch: one process, no sharding; deepspeed: ZeRO; auto: deepspeed under torchrun with
    several ranks and for offload cpu, else torch."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """DeepSpeed ZeRO stage."""
    offload: Literal["none", "idle", "cpu"] = "none"
    """idle: what a phase of PPO does not use (reference, reward model, optimisers) waits in host
    memory meanwhile; cpu: ZeRO-3 keeps and runs the optimisers there, and keeps the frozen models'
    parameters."""


@dataclass(frozen=True)
class LogConfig:
    """Where numbers go, beside metrics.jsonl, which is always written."""

    every: PositiveInt = 1
    """Write a row of metrics every so many optimiser steps."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run's folder."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""


@dataclass(frozen=True)
class StageConfig:
    """What every training stage has."""

    output: str = ""
    """Folder for the trained model, metrics.jsonl and config.yaml; must not hold a run already."""
    seed: NonNegativeInt = 0
    """Seed of the data order, of fresh weights and of sampling."""
    overwrite: bool = False
    """Replace a run that is already in the output folder."""
    save_every: NonNegativeInt = 0
    """Write a checkpoint every so many optimiser steps (PPO: phases) and at the end; 0: none."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    resume: str = "never"
    """auto: go on where the output folder holds a checkpoint, start where it does not; or a run's
    or a checkpoint's folder to go on from; never: start."""
    keep_best: str | None = None
    """Keep the model with the best value of this metric of eval_data under best/: eval/loss, for
    PPO eval/reward/sum_mean, or another one. The lowest is best if its name ends in loss, else the
    highest. null: none."""
    watchdog: NonNegativeFloat = 600.0
    """Seconds without progress (before the first step is done: three times as many, at least 60)
    after which the run is ended, with the rank and the phase that hang named; a rank that dies is
    named at once. 0: never."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)


@dataclass(frozen=True)
class SupervisedConfig(StageConfig):
    """Shared by sft, rm and scalar-rm."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval_data: DataConfig | None = None
    """Held-out rows; their loss and accuracy are logged. null: no evaluation."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: PositiveFloat = 1.0
    """Passes over the data; ignored when max_steps is given."""
    max_steps: PositiveInt | None = None
    """Optimiser steps in all."""
    batch_size: PositiveInt = 64
    """Rows (triples or demonstrations) per optimiser step, over all ranks."""
    microbatch_tokens: PositiveInt = 4096
    """Tokens that one rank packs into one forward and backward."""
    eval_every: NonNegativeInt = 0
    """Evaluate every so many steps, and always at the end; 0: at the end only."""


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on the response (or the chosen one) given the prompt."""

    response_column: Literal["response", "chosen"] = "chosen"
    """Which text of a row is the demonstration."""


@dataclass(frozen=True)
class RMConfig(SupervisedConfig):
    """Seq2seq reward model: correction and identity mapping by sequence maximum likelihood."""

    correction_weight: NonNegativeFloat = 1.0
    """Weight of the examples (prompt, rejected) -> chosen."""
    identity_weight: NonNegativeFloat = 1.0
    """Weight of the examples (prompt, chosen) -> chosen."""
    reduction: Literal["token_mean", "sequence_sum"] = "token_mean"
    """token_mean: weighted mean over all output tokens of the batch; sequence_sum: sum over the
    tokens of a sequence, then weighted mean over sequences."""
    probe_rows: NonNegativeInt = 64
    """Held-out triples on which copied fraction, correction and pair accuracy and the correlation
    of reward with length are measured; 0 measures none."""


@dataclass(frozen=True)
class ScalarRMConfig(SupervisedConfig):
    """Scalar reward model: Bradley-Terry on the last token's hidden state."""

    centre_coef: NonNegativeFloat = 0.0
    """Weight of the penalty (r_chosen + r_rejected)^2, which keeps scores near 0."""


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled. top_p is 1 and top_k is off: logprobs are then those sampled."""

    max_new_tokens: PositiveInt = 128
    """Longest response; one that reaches it without end of sequence is truncated."""
    temperature: NonNegativeFloat = 1.0
    """Divides the logits, in sampling and in every logprob; 0 in evaluation means greedy."""
    batch_size: PositiveInt = 64
    """Most prompts that one rank generates for at a time."""
    kv_cache_gib: NonNegativeFloat = 0.0
    """GiB that the keys and values of these prompts and their responses may take; where fewer than
    batch_size fit, fewer are generated for at a time. 0: batch_size alone decides."""


@dataclass(frozen=True)
class TokenRewardConfig:
    """From RM statistics to a reward for every token (method: sequence-to-sequence reward)."""

    mode: Literal["teacher_forced", "aligned"] = "teacher_forced"
    """teacher_forced: one forward pass; aligned: edit-distance alignment with a generated
    correction."""
    divergence: Literal["argmax", "rank", "margin"] = "argmax"
    """What counts as agreeing with the RM."""
    top_k: PositiveInt = 1
    """For rank: agrees while fewer than top_k logits exceed the token's."""
    max_margin: NonNegativeFloat = 0.0
    """For margin: diverges when max logit - token's logit exceeds this, in nats."""
    positive: NonNegativeFloat = 1.0
    """Reward of a token before the divergence."""
    negative: NonNegativeFloat = 1.0
    """Magnitude of the penalty of a diverging token."""
    match: float = 0.0
    """Reward of a token after the divergence that agrees again."""
    normalize_length: bool = False
    """Divide a response's rewards by its length."""


@dataclass(frozen=True)
class RewardConfig:
    """The reward that PPO maximises."""

    kind: RewardKind = "seq2seq"
    """Which reward model: text (a reward per token) or Bradley-Terry (one at the last token)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    token: TokenRewardConfig = field(default_factory=TokenRewardConfig)
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Subtracted at the last token of a truncated response, in raw reward units."""
    clip: NonNegativeFloat = 0.0
    """Clip each token's scaled reward to [-clip, clip] before the KL penalty; 0: no clipping."""
    scale: Literal["none", "unit_std"] = "unit_std"
    """unit_std: divide by the standard deviation of the sequence sum over the first rollouts of
    the initial policy, so that kl.coef means the same for every reward."""
    # A standard deviation needs two responses.
    calibration_prompts: Annotated[int, Bounds(2)] = 256
    """Responses of the initial policy that fix the scale, one to a prompt; fewer prompts are asked
    again, with other seeds."""


@dataclass(frozen=True)
class KLConfig:
    """Penalty that keeps the policy near the reference."""

    coef: NonNegativeFloat = 0.05
    """beta: reward units per nat."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: multiply beta so that the KL per response nears target."""
    target: PositiveFloat = 6.0
    """Adaptive: KL to the reference per response, in nats."""
    horizon: PositiveInt = 10000
    """Adaptive: responses over which beta may change by a factor e at full error."""


@dataclass(frozen=True)
class CriticConfig:
    """The value function."""

    path: str | None = None
    """Model to start from; null: the policy. A scalar RM's score head is taken over."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    clip: NonNegativeFloat = 0.0
    """Clip range of the value around its old value, in the returns' own units; 0: no clipping. It
    bounds how far a phase can move the critic (docs/settings.md)."""


@dataclass(frozen=True)
class PPOConfig(StageConfig):
    """Proximal policy optimisation on token-level rewards."""

    policy: ModelConfig = field(default_factory=ModelConfig)
    reference: str | None = None
    """Frozen reference policy; null: the initial policy."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts; chosen and rejected are not read."""
    eval_data: DataConfig | None = None
    """Held-out prompts (as many as its limit): reward, KL and length of a response to each are
    logged under eval/. null: no evaluation."""
    eval_every: NonNegativeInt = 10
    """Evaluate every so many phases, before the first and after the last; 0: these two only."""
    eval_temperature: NonNegativeFloat | None = None
    """Temperature of these responses, 0 for greedy ones; null: that of sampling."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    total_steps: PositiveInt = 100
    """Rollout phases; each samples rollout_size responses and trains on them."""
    rollout_size: PositiveInt = 128
    """Responses per phase, over all ranks."""
    minibatch_size: PositiveInt = 64
    """Responses per optimiser step, over all ranks."""
    ppo_epochs: PositiveInt = 2
    """Passes over a phase's responses."""
    critic_warmup_steps: NonNegativeInt = 0
    """First phases in which only the critic learns."""
    microbatch_tokens: PositiveInt = 4096
    """Tokens that one rank packs into one forward and backward."""
    gamma: Annotated[float, Bounds(0, 1)] = 1.0
    """Discount per token."""
    lam: Annotated[float, Bounds(0, 1)] = 0.95
    """GAE's lambda."""
    clip_low: Annotated[float, Bounds(0, 1)] = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: NonNegativeFloat = 0.2
    """Upper clip range."""
    max_log_ratio: Annotated[float, Bounds(0, 80)] = 20.0
    """Bound on |log ratio|; a token beyond it gives no policy gradient, and no NaN. 0: none."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Whiten advantages over all tokens of the phase, over all ranks."""
    samples_every: PositiveInt = 10
    """Write some responses with their token rewards to samples.jsonl every so many phases."""
