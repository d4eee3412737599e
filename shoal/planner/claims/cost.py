"""Claims about training: hours, money, utilisation, electricity; and what Fire-Flyer says of cheap machines."""

from shoal.planner.claims.claim import Claim, figure
from shoal.planner.published_figure import PublishedFigure
from shoal.planner.published_runs import published_figures

_FIRE = "Fire-Flyer AI-HPC, tables 2 and 3"


def cost_claims() -> tuple[Claim, ...]:
    """In the order of the table; the figures are those of `published_runs`."""
    known = {one.name: one for one in published_figures()}

    def rows(*names: str) -> tuple[PublishedFigure, ...]:
        return tuple(known[name] for name in names)

    return (
        Claim(
            number=11,
            title="training DeepSeek-V2 takes 42.5 % fewer hours than DeepSeek-67B",
            command="shoal plan --claim 11",
            figures=rows(
                "training hours of V2 against DeepSeek-67B, saved",
                "deepseek-v2, utilisation implied by its hours",
                "deepseek-67b, utilisation implied by its hours",
            ),
        ),
        Claim(
            number=15,
            title="DeepSeek-V3 trained at 43.73 % of the bf16 peak, 38.94 % counted causally",
            command="shoal plan --claim 15",
            figures=rows("V3 utilisation, not causal", "V3 utilisation, causal"),
        ),
        Claim(
            number=16,
            title="DeepSeek-V3 trained on 272.80 billion tokens a day",
            command="shoal plan --claim 16",
            figures=rows("V3 tokens per day"),
        ),
        Claim(
            number=17,
            title="pretraining DeepSeek-V3 took 2.664 million H800 hours",
            command="shoal plan v3 --tokens 14.8T --explain training_gpu_hours",
            words="from the operations alone, at the published utilisation of 0.3894, the plan gives 2.672 million",
            figures=rows(
                "V3 pretraining hours, from hours per trillion tokens",
                "V3 pretraining hours, from tokens per day",
                "V3 days per trillion tokens",
                "deepseek-v3 pretraining, utilisation implied by its hours",
                "deepseek-v3 context extension, utilisation implied by its hours",
            ),
        ),
        Claim(
            number=18,
            title="DeepSeek-V3's official run cost 5.576 million USD",
            command="shoal plan --claim 18",
            words="hours at an assumed 2 USD, without research, ablations, data and staff; the hours of post-training (5K) do not "
            "follow from anything published",
            figures=rows("V3 hours in all", "V3 cost in all, official run only"),
        ),
        Claim(
            number=19,
            title="DeepSeek-R1 took 147K hours, 294K USD",
            command="shoal plan --claim 19",
            words="the hours of each stage do not follow from the work done, whose tokens are not published; '648 GPUs' in the press is "
            "a misreading of the paper's 64*8",
            figures=rows("R1-Zero hours", "R1 RL hours", "R1 hours in all", "R1 cost in all"),
        ),
        _fire_flyer(),
        Claim(
            number=57,
            title="electricity of training DeepSeek-V3",
            command="shoal plan v3 --tokens 14.8T --explain training_kwh",
            words="no official figure exists, so there is nothing to recompute: a range, from the boards' 700 W alone to whole machines "
            "in an average building; published estimates from 350 W to 1,275 W differ in what they count",
            figures=rows("V3 electricity, boards alone", "V3 electricity, machines and building"),
        ),
    )


def _fire_flyer() -> Claim:
    performance = [100 * ours / theirs for ours, theirs in ((107, 131), (220, 263))]
    return Claim(
        number=43,
        title="a PCIe A100 cluster gives 83 % of a DGX's speed at 60 % of the price and 60 % of the power",
        command="shoal plan --claim 43",
        figures=(
            figure("TF32 products", "%", 83, performance[0], "107 / 131 TFLOP/s", _FIRE, tolerance=1.5),
            figure("FP16 products", "%", 83, performance[1], "220 / 263 TFLOP/s", _FIRE, tolerance=1),
            figure("power of a node", "%", 60, 100 * 2500 / 4200, "2,500 / 4,200 W", _FIRE, tolerance=0.5),
            figure("speed for the price", "times", 1.38, 0.83 / 0.60, "0.83 / 0.60", _FIRE, tolerance=0.005),
        ),
    )
