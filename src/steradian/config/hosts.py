"""Configuration sections of the hosts MACE, NequIP and ViSNet."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from steradian.config.section import Section

__all__ = [
    "SCALE",
    "ExpNormalConfig",
    "MACEConfig",
    "MessageScale",
    "NequIPConfig",
    "RadialConfig",
    "ReadoutConfig",
    "ViSNetConfig",
]


class RadialConfig(Section):
    """Radial basis times polynomial envelope (Gasteiger et al. 2020, equation 8)."""

    kind: Literal["bessel", "gaussian", "chebyshev"] = "bessel"
    num: int = Field(8, ge=1, description="number of basis functions")
    envelope_p: int = Field(6, ge=2, description="order of the polynomial envelope")
    trainable: bool = Field(False, description="learn the frequencies or widths")

    def summary(self) -> str:
        return f"{self.num} {self.kind}, envelope p = {self.envelope_p}"


class ReadoutConfig(Section):
    """Last readout of a host: linear when mlp is null."""

    mlp: int | None = Field(
        16, ge=1, description="hidden width of the readout of the last layer; null for a linear one"
    )


#: What the sum over neighbours is divided by: their average number (``mean``), its root, a number, or a learned one.
MessageScale = Literal["mean", "root", "learned"] | Annotated[float, Field(gt=0)]
SCALE = "messages are divided by the mean number of neighbours, its root, a number, or its root times a learned factor"

InteractionName = Literal["residual", "agnostic", "density_residual", "density"]


class MACEConfig(Section):
    """MACE (Batatia et al. 2022)."""

    kind: Literal["mace"] = "mace"
    num_layers: int = Field(2, ge=1, le=1000)
    num_channels: int = Field(64, ge=1, le=65536)
    hidden_l: int = Field(1, ge=0, le=3, description="highest degree of the hidden features (L)")
    l_max: int = Field(3, ge=0, le=6, description="highest degree of the spherical harmonics")
    correlation: int | list[int] = Field(3, description="correlation order 1-4, one number or one per layer")
    cutoff_A: float = Field(5.0, gt=0)
    radial: RadialConfig = RadialConfig()
    radial_mlp: list[int] = Field([64, 64, 64], description="hidden widths of the radial network")
    first_interaction: InteractionName = Field("residual", description="density: messages over a learned density")
    interaction: InteractionName = "residual"
    distance_transform: Literal["agnesi", "soft"] | None = Field(
        None, description="bases of a distance that depends on the elements; there is then no radial table"
    )
    pair_repulsion: Literal["zbl"] | None = Field(None, description="energy of screened nuclei at short distances")
    readout: ReadoutConfig = ReadoutConfig()
    avg_num_neighbors: float | None = Field(None, gt=0, description="null: measured on the training set")
    message_scale: MessageScale = Field("root", description=SCALE + "; published: mean")

    @model_validator(mode="after")
    def _check_correlation(self) -> MACEConfig:
        orders = [self.correlation] if isinstance(self.correlation, int) else self.correlation
        if any(not 1 <= order <= 4 for order in orders):
            raise ValueError(f"correlation must be between 1 and 4, not {self.correlation}")
        if not isinstance(self.correlation, int) and len(orders) != self.num_layers:
            raise ValueError(f"correlation lists {len(orders)} orders for {self.num_layers} layers")
        return self

    @property
    def correlations(self) -> list[int]:
        return [self.correlation] * self.num_layers if isinstance(self.correlation, int) else list(self.correlation)

    def summary(self) -> dict[str, str]:
        """What ``steradian inspect`` says of the host."""
        irreps = " + ".join(f"{degree}{'eo'[degree % 2]}" for degree in range(self.hidden_l + 1))
        return {
            "hidden irreps": f"{self.num_channels} x ({irreps})",
            "harmonics, correlation": f"l_max {self.l_max}, correlation {self.correlations}",
            "radial basis": self.radial.summary()
            + (f" of {self.distance_transform} distances" if self.distance_transform else "")
            + (f"; {self.pair_repulsion} repulsion" if self.pair_repulsion else ""),
        }


class NequIPConfig(Section):
    """NequIP (Batzner et al. 2022)."""

    kind: Literal["nequip"] = "nequip"
    num_layers: int = Field(3, ge=1, le=1000)
    num_channels: int = Field(32, ge=1, le=65536, description="features of every irrep")
    l_max: int = Field(1, ge=0, le=4, description="highest degree of features and harmonics")
    parity: bool = Field(True, description="features of both parities, or of the harmonics' parity only")
    cutoff_A: float = Field(5.0, gt=0)
    radial: RadialConfig = RadialConfig()
    radial_mlp: list[int] = Field([64, 64], description="hidden widths of the radial network")
    embedding_dim: int | None = Field(None, ge=1, description="width of the elements' embedding; null: num_channels")
    readout_mlp: list[int] = Field([], description="hidden widths of the readout; empty for a linear one")
    avg_num_neighbors: float | None = Field(None, gt=0, description="null: measured on the training set")
    message_scale: MessageScale = Field("root", description=SCALE + "; published: root")
    trainable_scales: bool = Field(False, description="learn the energy scale of every element")
    trainable_shifts: bool = Field(False, description="learn the energy shift of every element")

    @property
    def hidden_l(self) -> int:
        return self.l_max

    def summary(self) -> dict[str, str]:
        """What ``steradian inspect`` says of the host."""
        both = [f"{degree}{'eo'[degree % 2]}" for degree in range(self.l_max + 1)]
        if self.parity:
            both = [f"{degree}{parity}" for degree in range(self.l_max + 1) for parity in "eo"]
        return {
            "hidden irreps": f"{self.num_channels} x ({' + '.join(both)})",
            "harmonics": f"l_max {self.l_max}",
            "radial basis": self.radial.summary(),
        }


class ExpNormalConfig(Section):
    """Exponential-normal radial basis (Unke and Meuwly 2019) times a cosine cutoff."""

    kind: Literal["expnorm"] = "expnorm"
    num: int = Field(32, ge=2, description="number of basis functions")
    trainable: bool = Field(False, description="learn centres and widths")


class ViSNetConfig(Section):
    """ViSNet (Wang et al. 2024)."""

    kind: Literal["visnet"] = "visnet"
    num_layers: int = Field(5, ge=1, le=1000)
    num_channels: int = Field(256, ge=2, le=65536)
    l_max: int = Field(2, ge=1, le=2, description="highest degree of vectors and harmonics")
    num_heads: int = Field(8, ge=1)
    cutoff_A: float = Field(5.0, gt=0)
    radial: ExpNormalConfig = ExpNormalConfig()
    vertex: bool = Field(False, description="update edges with a second product, of vectors at the receiver")
    vector_norm: Literal["max_min"] | None = Field(None, description="rescale the lengths of vectors; has kinks")
    trainable_vector_norm: bool = Field(False, description="learn a factor on every channel of the vectors")
    smooth: bool = Field(True, description="vector messages vanish at the cutoff; false for the published model")
    avg_num_neighbors: float | None = Field(None, gt=0, description="null: measured on the training set")
    message_scale: MessageScale = Field(
        1.0, description=SCALE + " (an atom is its own neighbour too); published: 1, plain sums"
    )

    @model_validator(mode="after")
    def _check_widths(self) -> ViSNetConfig:
        if self.num_channels % self.num_heads:
            raise ValueError(f"num_channels ({self.num_channels}) must be a multiple of num_heads ({self.num_heads})")
        if self.num_channels % 2:
            raise ValueError(f"num_channels ({self.num_channels}) must be even: the readout halves it")
        return self

    @property
    def hidden_l(self) -> int:
        return self.l_max

    def summary(self) -> dict[str, str]:
        """What ``steradian inspect`` says of the host."""
        irreps = " + ".join(f"{degree}{'eo'[degree % 2]}" for degree in range(self.l_max + 1))
        return {
            "hidden irreps": f"{self.num_channels} x ({irreps})",
            "harmonics, heads": f"l_max {self.l_max}, {self.num_heads} heads",
            "radial basis": f"{self.radial.num} {self.radial.kind}, cosine cutoff",
        }
