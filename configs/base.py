r"""ViGOS on the embedded demo: every field of a run, with its default. Other configs start from this one.

    python -m vigos_jax.main --config configs/base.py

Trains the shipped 0.5 M-parameter model for 80 steps on two CPU cores, a few minutes in all, and prints a table:
Score (accuracy on images that contradict what one expects) rises, the share of descriptions that state what one
expects instead of what is shown falls. README.md has the measured numbers.

For a run of your own, write a file that imports this one and changes what differs:

    from configs import base

    def get_config():
        config = base.get_config()
        config.model.path = "Qwen/Qwen2.5-VL-3B-Instruct"
        config.data.source = "LMMs-Lab-Turtle/Vision-SR1-47K"
        return config
"""

import ml_collections
from ml_collections import ConfigDict

FORMAT = (
    "Describe what the image shows inside <description> </description>, reason inside <think> </think>, "
    "then give the final answer in \\boxed{}."
)


def get_config() -> ml_collections.ConfigDict:
    config = ConfigDict()
    config.seed = 0  # seed of data order, rollouts, adapter initialisation and dropout
    config.steps = 80  # optimizer steps of the whole run
    config.batch_size = 32  # rows of a global batch, over all devices and micro-batches
    config.gradient_accumulation_steps = 1  # micro-batches a step's gradient is summed over; they are formed by length
    config.checkpoint_every = 20  # optimizer steps between checkpoints; the last step is always saved
    config.keep_checkpoints = 2  # checkpoints kept, the newest ones
    config.eval_every = 0  # optimizer steps between evaluations by config.eval, rows of eval.jsonl; 0 for none
    config.log_every = 10  # steps between progress lines where there is no terminal

    config.report = ConfigDict()  # WORKDIR/report.html: curves, config, and rows answered again and again
    config.report.rows = 32  # the data's first (on the demo: its evaluation's), at most batch_size; 0 for none
    config.report.every = 20  # optimizer steps between their answers, each about as long as a step, and drawings

    config.log = ConfigDict()  # experiment trackers: they get every row of metrics.jsonl and need the extra `tracking`
    config.log.tensorboard = False  # write event files to WORKDIR/tensorboard
    config.log.wandb = ""  # a project of Weights & Biases; "" for none. WANDB_MODE=offline keeps it in WORKDIR/wandb.

    config.compilation_cache = "~/.cache/vigos_jax"  # folder of compiled programs, for the next run; "" keeps none

    config.model = ConfigDict()  # the base model
    # Hugging Face folder or hub id; "demo" and "demo_reasoning" are models shipped with the package.
    config.model.path = "demo"
    config.model.adapter = ""  # PEFT LoRA folder to start the student from; "" for none
    # Switches of the folder's chat template, by its own names, like enable_thinking=False; that is the default where a
    # template has it, as answers begin with config.prompts' assistant_prefill.
    config.model.chat_template_kwargs = ConfigDict()
    config.model.dtype = "float32"  # dtype of the frozen base and of computation: float32 | bfloat16
    config.model.quantization = "none"  # codes of the base under an adapter: none | int8 | nf4; docs/one_device.md
    config.model.remat = "none"  # what the backward pass recomputes: none | dots (all but matmuls) | full
    config.model.attention = "auto"  # auto (the device's best) | xla | cudnn (GPU from Ampere on) | splash (TPU)

    config.lora = ConfigDict()  # adapters of the student
    config.lora.rank = 0  # rank of new adapters; 0 trains all parameters instead
    config.lora.alpha = 128.0  # adapters are scaled by alpha / rank
    config.lora.dropout = 0.05  # dropout of an adapter's input, while training
    # What gets an adapter. language: q,k,v,o,gate,up,down of the decoder, in_proj_qkv, in_proj_z and out_proj of its
    # linear layers | official: the vision tower's MLPs too.
    config.lora.scope = "language"

    config.distributed = "off"  # several processes: off | auto (SLURM, Open MPI, TPU pods) | env; docs/multihost.md

    config.mesh = ConfigDict()  # over all devices of all processes; one axis may be -1: the remaining devices
    config.mesh.data = -1  # shards of the batch alone; -1: all remaining devices
    config.mesh.fsdp = 1  # shards of batch and parameters
    config.mesh.tensor = 1  # shards of heads and hidden widths
    # How leaves lie on the mesh: the first pattern found in a leaf's path (params/layers/q_proj/kernel) gives the
    # axis that splits each dimension, None and those left out for none. Leaves of stacked layers have the layer
    # first. Optimizer state has the paths of its weights. The vision towers, whose published widths (3420, 4304)
    # do not divide well, are split over fsdp alone.
    config.mesh.rules = (
        (r"visual/.*/(a|b)$", ()),
        (r"visual/blocks/.*(qkv|gate_proj|up_proj|mlp_in)/kernel", (None, "fsdp", None)),
        (r"visual/blocks/.*(proj|mlp_out)/kernel", (None, None, "fsdp")),
        (r"visual/.*(kernel|positions)", (None, "fsdp")),
        (r"visual/", ()),
        (r"layers/.*([qkv]_proj|gate_proj|up_proj|in_proj_\w+)/kernel", (None, "fsdp", "tensor")),
        (r"layers/.*(o_proj|down_proj|out_proj)/kernel", (None, "tensor", "fsdp")),
        (r"layers/.*/(bias|A_log|dt_bias)", (None, "tensor")),
        (r"layers/.*/conv", (None, None, "tensor")),
        (r"layers/.*([qkv]_proj|gate_proj|up_proj|in_proj_\w+)/a", (None, "fsdp", None)),
        (r"layers/.*([qkv]_proj|gate_proj|up_proj|in_proj_\w+)/b", (None, None, "tensor")),
        (r"layers/.*(o_proj|down_proj|out_proj)/a", (None, "tensor", None)),
        (r"layers/.*(o_proj|down_proj|out_proj)/b", (None, None, "fsdp")),
        (r"embedding", ("tensor", "fsdp")),
        (r"lm_head", ("fsdp", "tensor")),
        (r"", ()),
    )

    config.data = ConfigDict()  # the training rows, docs/data.md
    # demo | demo_reasoning | a .jsonl | a .parquet | a folder of .parquet | a hub data set (owner/name)
    config.data.source = "demo"
    config.data.split = "train"  # split of a hub data set or folder
    config.data.shuffle = True  # a new order in every epoch
    config.data.workers = 0  # processes that read and encode; 0 for threads of the main one. Same batches.
    config.data.window = 1  # batches whose rows are grouped by size among themselves, against padding; 1 for none
    # Where a row has them: a column or a path into one, like "messages.0.content"; "" finds the usual names, and
    # conversations of one turn. What was found is said at the start; --mode data shows it.
    config.data.columns = ConfigDict(dict.fromkeys(("problem", "answer", "images", "id", "options"), ""))
    config.data.options_template = ""  # appends a row's options to the question, "{letter}. {option}" for each; "" none
    config.data.image_folder = ""  # folder that paths of images start at and may lead into; "" is the source's own
    # Larger images are made smaller; 0 is the model folder's limit. What does not fit config.buckets is made smaller
    # still.
    config.data.max_pixels = 0
    config.data.min_pixels = 0  # smaller images are enlarged; 0 is the model folder's limit
    config.data.fields = ()  # further columns of texts that roles' prompts may show as {NAME}
    config.data.max_images = 1  # images of a row; rows with more are bad rows
    config.data.max_bad_fraction = 0.05  # share of unusable rows (skipped and counted) above which the run stops
    config.data.blank_images = False  # demo only: grey images, a control that must learn nothing

    # Prompts. `user` is exactly the text after the image in the user turn; {problem} and {reference} are filled in,
    # every other brace is literal. `assistant_prefill` starts the assistant's turn. What a role's template does not
    # name, that role never sees: the perception teacher gets the image alone.
    config.prompts = ConfigDict()
    config.prompts.student = ConfigDict({"user": "{problem}\n" + FORMAT, "assistant_prefill": "<description>"})
    config.prompts.perception = ConfigDict({"user": "", "assistant_prefill": "<description>"})
    config.prompts.reasoning = ConfigDict(
        {
            "user": "{problem}\nReference answer: {reference}\nReason from the image to this answer.",
            "assistant_prefill": "<description>",
        }
    )
    config.prompts.reference = ConfigDict(
        {"user": "{problem}\nReference answer: {reference}\n" + FORMAT, "assistant_prefill": "<description>"}
    )

    # Teacher roles (Section 4 of the paper). A role scores its spans of the student's own rollout:
    #   scores      any of description, reasoning, answer, completion (every token; of invalid rollouts always)
    #   when        valid | invalid | always: which rollouts, by format
    #   divergence  forward_kl is KL(teacher || student), reverse_kl is KL(student || teacher), jsd lies between
    #   weight      lambda; 0 leaves the role out
    #   clip        largest value one token contributes; 0 for no clip
    #   image       original | none | blank | crop | resized | other | shuffled: what the teacher sees; docs/roles.md
    # and, seldom needed: clip_per, first_clip, last_clip, beta, reads (see TeacherRole in vigos_jax/method/roles.py).
    # The paper clips at 0.05, for 1,488 steps at 5e-6. The demo takes 80 steps at 3e-4 and needs the gradient of the
    # tokens that a clip would silence.
    config.roles = ConfigDict()
    config.roles.perception = role(("description",), "valid", "forward_kl", weight=1.0, clip=0.0)
    config.roles.reasoning = role(("reasoning", "answer"), "valid", "forward_kl", weight=1.0, clip=0.0)
    config.roles.reference = role(("completion",), "invalid", "reverse_kl", weight=2.0, clip=0.0)

    config.span_rule = "paper"  # how description, reasoning and answer are found: paper | released (the authors' code)

    config.teacher = ConfigDict()  # the teachers' parameters
    config.teacher.weights = "frozen"  # frozen: the initial ones | ema: a moving average | live: the student's own
    config.teacher.ema_rate = 0.01  # how far the average moves towards the student after each step

    config.sampling = ConfigDict()  # how rollouts are sampled
    config.sampling.max_tokens = 48  # tokens of the longest completion
    config.sampling.temperature = 1.1  # divides the logits; 0 is greedy
    config.sampling.top_k = 20  # sample among the k likeliest tokens; 0 keeps all
    config.sampling.top_p = 0.95  # sample among the fewest tokens that hold this probability; 1 keeps all
    config.sampling.min_p = 0.0  # drop tokens below this share of the likeliest's probability; 0 keeps all
    config.sampling.repetition_penalty = 1.0  # on tokens of prompt and completion; 1 is off
    config.sampling.presence_penalty = 0.0  # on tokens of the completion; 0 is off
    config.sampling.micro_batch = 0  # rows whose images and prompts are computed at once; 0: as memory allows
    config.sampling.decode_batch = 0  # rows that are decoded at once; 0: all; fewer need less memory

    config.rollout = ConfigDict()  # who samples: docs/servers.md
    config.rollout.engine = "native"  # native: this package's sampler | vllm | sglang: servers at config.rollout.urls
    config.rollout.urls = ()  # base addresses, like ("http://localhost:8000",); each process of a run takes its share
    config.rollout.model = ""  # the name that the servers serve the base under; "" is config.model.path as written
    config.rollout.concurrency = 32  # requests at a time to each server
    config.rollout.timeout = 600.0  # seconds of one request
    config.rollout.retries = 4  # further attempts of a request, each on a server that is well
    config.rollout.key_env = ""  # environment variable that holds the servers' key; "" for none
    config.rollout.adapter_dir = ""  # folder that the servers see under the same path; "" is WORKDIR/adapters
    config.rollout.max_staleness = 0  # optimizer steps that rollouts may lag behind; 0 is on-policy; native: 0
    config.rollout.sync_every = 1  # optimizer steps between new adapters, at most max_staleness + 1; native: 1

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.learning_rate = 3e-4  # after the warm-up
    config.optimizer.schedule = "constant"  # learning rate after the warm-up: constant | linear (to 0 at the last step)
    config.optimizer.warmup_steps = 5  # steps over which the learning rate rises from 0
    config.optimizer.b1 = 0.9  # decay of the mean of gradients
    config.optimizer.b2 = 0.999  # decay of the mean of their squares
    config.optimizer.eps = 1e-8  # added to the root of the latter
    config.optimizer.weight_decay = 0.0  # times the learning rate, taken from every weight in each step
    config.optimizer.max_grad_norm = 1.0  # a gradient of a larger global norm is scaled down to it

    config.loss = ConfigDict()  # the objective, beside config.roles
    config.loss.temperature = 1.0  # divides all logits in the divergence
    config.loss.reduction = "tokens"  # a role's mean is over its tokens | sequences: over rollouts' means of tokens
    config.loss.chunk = 32  # supervised tokens per row whose logits exist at a time: less memory, more passes

    # Sizes that arrays are padded to. Fewer sizes mean fewer compilations, more sizes less padding.
    config.buckets = ConfigDict()
    config.buckets.patches = (36, *sizes(64, 16384))  # image patches of a row, in window slots
    config.buckets.prompt = sizes(64, 32768)  # student prompt tokens
    config.buckets.completion = (48, *sizes(64, 4096))  # completion tokens, and what the cache grows by
    config.buckets.sequence = sizes(64, 65536)  # a student's prompt and completion, or all teacher branches of a row

    # A step whose loss or gradient is not finite changes nothing; its rows and rollouts go to WORKDIR/nonfinite.
    # A policy that collapses shows it: where a mean over the last steps leaves its bounds, a warning says so.
    config.guards = ConfigDict()
    config.guards.max_skipped = 5  # steps in a row, skipped as not finite, that end the run
    config.guards.window = 20  # steps over which the means below are taken
    config.guards.valid_rate = (0.0, 1.0)  # share of valid rollouts, lowest and highest
    config.guards.completion_tokens = (2.0, 1e9)  # mean length of a completion
    config.guards.entropy = (1e-3, 1e9)  # nats per supervised token
    config.guards.stop = False  # save and end the run then, instead of warning only
    # Largest mean |log p of the sampler - of the student| per supervised token; a step above it ends the run, saved.
    # 0: no bound for the native engine; for servers 1e-3 in float32 on-policy without lora.dropout, else 0.1.
    config.guards.sampler_gap = 0.0

    config.demo_eval = ConfigDict()  # before and after a run on the demo
    config.demo_eval.questions = 1000  # questions of each kind (conflict, prior); 0 for no evaluation
    config.demo_eval.batch_size = 250  # questions answered at a time
    config.demo_eval.seed = 42  # seed of questions and answers

    config.eval = ConfigDict()  # --mode eval and config.eval_every: the paper's protocol (Table A.V)
    config.eval.engine = "native"  # who answers: native | rollout: config.rollout's engine
    config.eval.tasks = ("demo",)  # names of vigos_jax/evaluation/tasks
    names = ("mm_vet", "mmmu", "mmmu_pro", "mmmu_pro_vision", "mathverse", "mathvista", "mmsi", "realworldqa")
    names = (*names, "cv_bench", "vilp_f", "vilp_p", "vlind", "demo", "demo_reasoning")
    config.eval.sources = ConfigDict(dict.fromkeys(names, ""))  # a folder or hub data set instead of the task's own
    config.eval.limit = 0  # rows of each task, evenly spread over it; 0 for all
    config.eval.samples = 5  # answers per question; greedy, and for ViLP and VLind, it is one
    config.eval.temperature = 1.0  # divides the logits; 0 is greedy
    config.eval.top_p = 0.9  # as config.sampling.top_p
    config.eval.top_k = 20  # as config.sampling.top_k
    config.eval.max_tokens = 48  # tokens of the longest answer; the paper's is 4096
    config.eval.seed = 42  # seed of the answers
    config.eval.prompt = "structured"  # structured: the student's own | plain: the next field, the same-prompt control
    # The text after the image where config.eval.prompt is "plain".
    config.eval.plain_prompt = "{problem}\nThink step by step, then give the final answer in \\boxed{}."
    config.eval.demo_questions = 250  # questions of each kind of the demo
    config.eval.batch_size = 32  # answers sampled at a time
    config.eval.output = ""  # folder for answers and report; "" is WORKDIR/eval
    config.eval.judge = ConfigDict()  # a server that speaks OpenAI's protocol, for what rules cannot decide
    config.eval.judge.mode = "off"  # what the judge is asked: off | on_failure: what a rule calls wrong | always
    config.eval.judge.url = ""  # the server's base address, like http://localhost:8000/v1
    config.eval.judge.model = ""  # the model's name at the server
    config.eval.judge.key_env = "OPENAI_API_KEY"  # environment variable that holds the key
    config.eval.judge.batch = 8  # answers per call
    config.eval.judge.concurrency = 8  # calls at a time
    config.eval.judge.timeout = 60.0  # seconds of one call
    config.eval.judge.retries = 4  # further attempts of a call; what fails then stays unjudged

    config.score = ConfigDict()  # --mode score
    config.score.rollouts = ""  # .jsonl of rollouts, see docs/files.md
    config.score.output = ""  # folder for scores.jsonl and summary.json
    config.score.batch_size = 8  # rows scored at a time

    config.diagnose = ConfigDict()  # --mode diagnose
    config.diagnose.rollouts = ""  # .jsonl of rollouts, as for score; "" samples them on config.data
    config.diagnose.rows = 200  # rows to sample rollouts for; on the demo, images that contradict the prior
    config.diagnose.wrong_answers = 4  # wrong answers shown to each role in turn, at most
    config.diagnose.wrong_answers_file = ""  # .jsonl of {"id", "wrong_answers": [...]}
    config.diagnose.output = ""  # folder for palr.jsonl and its page; "" is WORKDIR/diagnose
    config.diagnose.batch_size = 16  # rows scored at a time
    config.diagnose.seed = 42  # seed of rollouts, choice of wrong answers and bootstrap

    config.preview = ConfigDict()  # --mode data: how the rows of config.data are understood
    config.preview.rows = 200  # rows that are read: the run's first batches
    config.preview.shown = 3  # rows that are shown as the student and each teacher will read them
    config.preview.output = ""  # folder for data.html; "" is WORKDIR, if that is given

    config.generate = ConfigDict()  # --mode generate
    config.generate.image = ""  # image file
    config.generate.question = ""  # the question about it

    config.export = ConfigDict()  # --mode export, and the end of a run
    config.export.output = ""  # the Hugging Face folder; "" is WORKDIR/export at the end of a run
    config.export.kind = "merged"  # merged: full checkpoint | adapter: PEFT LoRA
    config.export.dtype = "float32"  # of a merged export: float32 | bfloat16, which rounds, and says what that costs
    config.export.step = 0  # step of the checkpoint that --mode export takes; 0 is the newest
    config.export.max_shard_gb = 5.0  # largest file of weights, in 1e9 bytes
    config.export.check = False  # load what was written again and compare; needs memory for the weights once more
    config.export.push_to = ""  # owner/name on the hub, made private; the token is HF_TOKEN's. "" pushes nothing
    config.export.after_training = True  # export when a run has finished

    config.plan = ConfigDict()  # --mode plan: devices that need not be here; see docs/scaling.md
    # The devices. TPUs: v5e:1x1, v5e:2x4, v5p:2x2x2, v6e:2x4 | GPUs: h100:8, h100:2x8 on two hosts, h200:N, a100:N,
    # b200:N, l4:N, rtx4090:N, t4:N
    config.plan.topology = "cpu:8"  # cpu:N: host devices, which need no compiler of their own
    # 0 here and in the next three is what is known of the topology; of host devices an A100's: 80, 312, 2039, 300.
    config.plan.memory_gb = 0.0  # memory of one device, in 1e9 bytes
    config.plan.tflops = 0.0  # 1e12 operations a second of one device, in 16-bit matrix products
    config.plan.bandwidth_gbs = 0.0  # 1e9 bytes a second of its memory
    config.plan.interconnect_gbs = 0.0  # 1e9 bytes a second received from other devices, over all links
    config.plan.patches = 36  # patches of a row's images, rounded up to config.buckets
    config.plan.prompt = 48  # prompt tokens of a row, the visual ones among them, rounded up to config.buckets
    config.plan.completion = 48  # completion tokens of a row, rounded up to config.buckets
    config.plan.effort = -1.0  # the compiler's, for speed: 0 as in a run; -1 takes a tenth of the time for TPUs
    config.plan.advise = True  # where it does not fit, compile changes until one does; each takes as long again
    config.plan.output = ""  # file for the numbers, as JSON; "" for none
    config.plan.programs = ""  # folder for the compiled programs, as text; "" for none

    config.lock()  # setting a field that is not here is an error, also in a file that imports this one
    config.prompts.unlock()
    config.roles.unlock()  # but roles and their prompts are for you to name
    config.model.chat_template_kwargs.unlock()  # and a template names its switches
    return config


def sizes(first: int, last: int) -> tuple[int, ...]:
    """Powers of two and three steps between each: 64, 80, 96, 112, 128, 160, ... At most a fifth is padding."""
    out, n = [], first
    while n < last:
        out += [n + n * i // 4 for i in range(4)]
        n *= 2
    return (*out, last)


def role(  # noqa: PLR0913  (a row of the table, written out)
    scores: tuple[str, ...],
    when: str,
    divergence: str,
    *,
    weight: float,
    clip: float = 0.05,
    clip_per: str = "token",
    first_clip: float = 0.0,
    last_clip: float = 0.0,
    beta: float = 0.5,
    reads: str = "completion",
    image: str = "original",
    image_column: str = "",
    image_margin: float = 0.0,
    image_pixels: int = 0,
    token_weights: str = "uniform",
    token_top_k: int = 0,
    model: str = "",
) -> ConfigDict:
    """One row of a role table, with the paper's clip unless another is given; see vigos_jax/method/roles.py."""
    return ConfigDict(
        {
            "scores": scores,
            "when": when,
            "divergence": divergence,
            "weight": weight,
            "clip": clip,
            "clip_per": clip_per,
            "first_clip": first_clip,
            "last_clip": last_clip,
            "beta": beta,
            "reads": reads,
            "image": image,
            "image_column": image_column,
            "image_margin": image_margin,
            "image_pixels": image_pixels,
            "token_weights": token_weights,
            "token_top_k": token_top_k,
            "model": model,
        }
    )
