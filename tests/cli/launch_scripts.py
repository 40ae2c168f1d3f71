"""The launch scripts of `launch_scripts/`, and what was checked of each by hand once: the parameters against the
published model, ranks and layout against the original script."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "launch_scripts"


@dataclass(frozen=True)
class LaunchScript:
    """A script as a person starts it.

    Attributes:
        name: of the file, without its suffix.
        parameters, active: of the model; active a token where it has experts.
        ranks, layout: what it trains on, as the planner writes it.
        before, behind: variables before it and arguments behind it.
        flags: given beside it, where it does not say its ranks.
    """

    name: str
    parameters: int
    ranks: int
    layout: str
    active: int = 0
    before: str = ""
    behind: str = ""
    flags: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What --command takes."""
        return " ".join(filter(None, (self.before, str(FOLDER / f"{self.name}.sh"), self.behind)))


def _moe(name: str, parameters: int, active: int, ranks: int, layout: str, behind: str = "") -> LaunchScript:
    return LaunchScript(name, parameters, ranks, layout, active, behind=behind)


LLAMA_70B, QWEN_235B, DEEPSEEK_LITE = 70_553_706_496, (235_093_634_560, 22_190_763_520), (15_706_484_224, 2_661_150_208)
DEEPSEEK_V3, WITH_MTP = (671_026_404_352, 37_552_282_624), (682_636_472_320, 38_240_382_976)
PAI = "dsw {} {} {} 1e-5 {} bf16 {} {} true {} out"

SCRIPTS = (
    LaunchScript("nv_gpt3_175b", 174_615_846_912, 128, "TP8 x PP16 x DP1", behind="ckpt data vocab.json merges.txt"),
    LaunchScript("nv_llama3_8b_fp8", 8_030_261_248, 8, "TP1 x PP1 x DP8"),
    LaunchScript("nv_llama3_8b_fsdp", 8_030_261_248, 8, "TP1 x PP1 x DP8"),
    _moe("nv_mixtral_8x7b", 46_702_792_704, 12_879_925_248, 32, "TP1 x PP4 x DP8, experts EP8 x ETP1", behind="c d t"),
    LaunchScript("nv_sc21_145b", 145_622_261_760, 1536, "TP8 x PP8 x VP2 x DP24"),
    _moe("zoo_deepseek_v3", *WITH_MTP, 1024, "TP2 x PP8 x VP4 x DP64, experts EP64 x ETP1"),
    _moe("zoo_deepseek_v2", 235_741_434_880, 21_375_800_320, 256, "TP1 x PP16 x DP16, experts EP8 x ETP1"),
    _moe("zoo_qwen3_235b", *QWEN_235B, 256, "TP2 x PP8 x VP4 x DP16, experts EP32 x ETP1"),
    _moe("zoo_qwen3_30b", 30_532_122_624, 3_353_032_704, 32, "TP1 x PP1 x DP32, experts EP8 x ETP1"),
    _moe("zoo_mixtral_8x22b", 140_620_634_112, 39_152_031_744, 128, "TP2 x PP8 x VP7 x DP8, experts EP8 x ETP1"),
    _moe("zoo_kimi_k2", 1_026_408_209_408, 32_861_477_888, 128, "TP16 x PP2 x DP4, experts EP64 x ETP1"),
    _moe("ms_deepseek3_671b", *WITH_MTP, 512, "TP4 x PP8 x DP16, experts EP32 x ETP1"),
    _moe("ms_qwen3_235b", *QWEN_235B, 256, "TP1 x PP4 x VP3 x DP64, experts EP32 x ETP1"),
    LaunchScript("ms_qwen25_72b_32k", 72_706_203_648, 128, "TP8 x PP4 x CP4 (p2p) x DP1"),
    _moe("ms_deepseek2_lite", *DEEPSEEK_LITE, 16, "TP1 x PP1 x DP16, experts EP8 x ETP1"),
    _moe("ms_glm45_air", 109_227_304_960, 13_723_002_880, 128, "TP1 x PP4 x DP32, experts EP16 x ETP1"),
    LaunchScript("ms_qwen3_32b", 32_762_123_264, 16, "TP8 x PP2 x VP8 x DP1"),
    _moe("ms_phi35_moe", 41_872_723_968, 6_640_570_368, 16, "TP4 x PP4 x VP4 x DP1, experts EP1 x ETP4"),
    LaunchScript("pai_qwen25", 72_706_203_648, 32, "TP8 x PP4 x DP1", 0, "NODES=4",
                 PAI.format("72B", 1, 64, 4096, 8, 4, "sel")),
    LaunchScript("pai_llama3", LLAMA_70B, 64, "TP8 x PP4 x DP2", 0, "NODES=8",
                 PAI.format("70B", 1, 512, 8192, 8, 4, "full")),
    LaunchScript("pai_deepseek_v3", DEEPSEEK_V3[0], 256, "TP4 x PP8 x DP8, experts EP16 x ETP1", DEEPSEEK_V3[1],
                 "NODES=32 EP=16", PAI.format("A37B", 1, 2048, 4096, 4, 8, "full")),
    LaunchScript("bs_tr11_176b", 176_247_242_752, 192, "TP4 x PP12 x DP4"),
    LaunchScript("bs_tr8_104b", 103_963_492_000, 512, "TP4 x PP32 x DP4"),
    LaunchScript("bs_tr1_13b", 12_854_282_240, 512, "TP2 x PP4 x DP64"),
    LaunchScript("fs_aquila_34b", 33_694_636_032, 512, "TP4 x PP4 x DP32", behind="home hosts data",
                 flags=("--world-size", "512")),
    LaunchScript("fs_aquila_70b", 70_096_527_360, 768, "TP8 x PP4 x DP24", behind="home hosts data",
                 flags=("--world-size", "768")),
    LaunchScript("primus_llama31_70b", LLAMA_70B, 8, "TP1 x PP1 x DP8"),
    _moe("primus_deepseek_v2_lite", *DEEPSEEK_LITE, 8, "TP1 x PP1 x DP8, experts EP8 x ETP1"),
    LaunchScript("neox_20b", 20_554_567_680, 96, "TP2 x PP4 x DP12"),
    LaunchScript("swiss_llama3_70b", 70_557_900_800, 128, "TP4 x PP8 x VP2 x DP4"),
)  # fmt: skip
