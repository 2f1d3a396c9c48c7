"""How each model of the accuracy table is trained: its config, its flags by data set, its seeds and its teachers."""

from __future__ import annotations

CONFIGS = {
    "gnb": "configs/config-glove-gnb.json",
    "cnn": "configs/config-glove-cnn.json",
    "densenet-cnn": "configs/config-densenet-cnn.json",
    "densenet-dsa": "configs/config-densenet-dsa.json",
    "minilm-cls": "configs/config-bert-cls.json",
    "minilm-cnn": "configs/config-bert-cnn.json",
    "cnn-taught": "configs/config-glove-cnn.json",
    "densenet-cnn-taught": "configs/config-densenet-cnn.json",
    "densenet-dsa-taught": "configs/config-densenet-dsa.json",
    "minilm-cls-taught": "configs/config-bert-cls.json",
    "minilm-cnn-taught": "configs/config-bert-cnn.json",
    "minilm-3": "configs/config-bert-cls.json",
    "minilm-3-taught": "configs/config-bert-cls.json",
    "minilm-3-mpl": "configs/config-bert-cls.json",
    "minilm-3-augmented": "configs/config-bert-cls.json",
    "minilm-3-pruned": "configs/config-bert-cls.json",
}
TEACHER = "minilm-cls"
TAUGHT = [model for model in CONFIGS if model.endswith(("-taught", "-mpl", "-augmented", "-pruned"))]
# Whose mean logits a student learns, as models and seeds, and augment_data.py's flags for the text.
Teaching = tuple[tuple[tuple[str, int], ...], str]
BY_ONE: Teaching = (((TEACHER, 1),), "--n_iter=10")
BY_THREE: Teaching = ((("minilm-cls", 1), ("minilm-cls", 2), ("minilm-cnn", 1)), "--n_iter=1")
TEACHING = {"minilm-cls-taught": BY_THREE, "minilm-cnn-taught": BY_THREE}  # others: BY_ONE
ENCODING = {"sst2": "--oov_scale=0.05"}  # preprocess.py's flags by data set, over the config
SST2 = "--epoch=1 --word_dropout=0.5 --rdrop=2 --measure=loss"  # its phrases repeat: one pass is enough
SNIPS = "--word_dropout=0.5 --rdrop=4"
TRAINABLE = "--embedding_trainable"
MINILM = "--lr=1e-4 --batch_size=64 --warmup_ratio=0.1"
LAYERWISE = "--layer_lr_decay=0.85"
MINILM_SST2 = "--batch_size=64 --warmup_ratio=0.1 --measure=last --lr=1e-4 --epoch=2 --rdrop=3"
BY_LOGITS = f"--augmented --criterion=MSELoss {TRAINABLE}"
BY_THEIR_LOGITS = ("--augmented --criterion=MSELoss --batch_size=64 --warmup_ratio=0.1 --measure=last --lr=2e-4 "
                   f"--epoch=2 {LAYERWISE}")
STUDENT = (f"--do_distill --teacher_model_path={{minilm-cls}} {MINILM} --epoch=2 --measure=last "
           "--student_init_layers=0,2,4 --kd_temperature=2")
# By data set and model: the flags (those of README.md, DISTILLATION.md and FASTFORMERS.md) of train.py or, for the
# students that it makes, of fastformers.py; and the seeds. {MODEL} is the model of that name on the same data set,
# {augmented} the augmented text.
RECIPES: dict[tuple[str, str], tuple[str, list[int]]] = {  # others: no flags, seed 1
    ("snips", "gnb"): ("", [1, 2, 3]),
    ("snips", "cnn"): (f"{TRAINABLE} {SNIPS}", [1, 2, 3]),
    ("snips", "densenet-cnn"): (f"{TRAINABLE} {SNIPS}", [1, 2, 3]),
    ("snips", "densenet-dsa"): (f"{TRAINABLE} {SNIPS}", [1, 2, 3]),
    ("snips", "minilm-cls"): (f"{MINILM} --epoch=4 --measure=last", [1, 2, 3]),
    ("snips", "minilm-cnn"): (f"{MINILM} --epoch=4 --measure=last", [1, 2, 3]),
    ("sst2", "gnb"): ("--epoch=3", [1]),
    ("sst2", "cnn"): (f"{TRAINABLE} {SST2}", [1, 2, 3]),
    ("sst2", "densenet-cnn"): (f"{TRAINABLE} {SST2}", [1]),
    ("sst2", "densenet-dsa"): (f"{TRAINABLE} {SST2}", [1]),
    ("sst2", "minilm-cls"): (f"{MINILM_SST2} {LAYERWISE}", [1, 2, 3]),
    ("sst2", "minilm-cnn"): (f"{MINILM_SST2} --token_cutoff=0.1 {LAYERWISE}", [1, 2, 3]),
    ("snips", "cnn-taught"): (f"{BY_LOGITS} --epoch=10", [1, 2, 3]),
    ("snips", "densenet-cnn-taught"): (f"{BY_LOGITS} --epoch=5", [1, 2, 3]),
    ("snips", "densenet-dsa-taught"): (f"{BY_LOGITS} --epoch=5", [1, 2, 3]),
    ("sst2", "cnn-taught"): (f"{BY_LOGITS} --epoch=2", [1, 2, 3]),
    ("sst2", "densenet-cnn-taught"): (f"{BY_LOGITS} --epoch=2", [1]),
    ("sst2", "densenet-dsa-taught"): (f"{BY_LOGITS} --epoch=2", [1]),
    ("sst2", "minilm-cls-taught"): (BY_THEIR_LOGITS, [1, 2, 3]),
    ("sst2", "minilm-cnn-taught"): (BY_THEIR_LOGITS, [1, 2, 3]),
    ("sst2", "minilm-3"): (f"{MINILM} --epoch=1 --rdrop=1 --measure=loss --bert_remove_layers=1,3,5", [1]),
    ("sst2", "minilm-3-taught"): (STUDENT, [1]),
    ("sst2", "minilm-3-mpl"): (f"{STUDENT} --mpl_data_path={{augmented}}", [1]),
    ("sst2", "minilm-3-augmented"): (f"{STUDENT} --augmented --epoch=1", [1]),
    ("sst2", "minilm-3-pruned"): ("--do_prune --model_path={minilm-3-augmented} --target_num_heads=6 "
                                  f"--target_ffn_dim=512 {MINILM} --recover_epoch=2 --measure=last", [1]),
    ("sample", "cnn"): ("", [42]),  # make quickstart
}
