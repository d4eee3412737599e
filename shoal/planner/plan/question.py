"""What a plan is asked about: a model, hardware, and settled assumptions."""

from dataclasses import dataclass

from shoal.planner.activations import Recipe, recipe
from shoal.planner.cost import Assumption
from shoal.planner.hardware import Cluster, device
from shoal.planner.plan.settings import Given, Settings, settle
from shoal.planner.rivals import Rival
from shoal.planner.training import V3_UTILISATION, stated_utilisation

CPU_UTILISATION = stated_utilisation(
    0.25,
    "about what Shoal reaches with models of 10 M parameters on two cores (benchmarks/results/train.json); a calibrated machine "
    "knows better: shoal plan --calibrate",
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A model on hardware under assumptions."""

    model: Rival
    hardware: Cluster
    """As it was named; `cluster` has the settings' numbers."""
    settings: Settings
    is_hardware_given: bool = True
    """False where nobody named hardware and this is one device of the default kind."""

    @property
    def cluster(self) -> Cluster:
        """The hardware as the settings have it."""
        return Cluster(device=self.settings.device(self.hardware.device), count=self.hardware.count)

    @property
    def is_without_accelerator(self) -> bool:
        """Whether the device is a machine with cores only."""
        return "fp8" not in self.hardware.device.flops and self.hardware.device.link_bytes_per_s == 0

    @property
    def recipe(self) -> Recipe:
        """Formats of training, `auto` resolved."""
        named = self.settings.words["recipe"]
        if named != "auto":
            return recipe(named)
        if self.is_without_accelerator:
            return recipe("cpu")
        return recipe("deepseek_fp8" if "fp8" in self.hardware.device.flops else "bf16")


def ask(model: Rival, cluster: Cluster | None, given: Given, utilisation: Assumption | None = None) -> Question:
    """Settle what is open.

    Args:
        cluster: None takes one H800, DeepSeek's own device.
        utilisation: what a calibration measured; None takes V3's, or a small run's where there is no accelerator.
    """
    on = cluster or Cluster(device=device("h800"))
    is_plain = on.device.link_bytes_per_s == 0
    assumed = utilisation or (CPU_UTILISATION if is_plain else V3_UTILISATION)
    settings = settle(given, model.config, on, assumed)
    return Question(model=model, hardware=on, settings=settings, is_hardware_given=cluster is not None)
