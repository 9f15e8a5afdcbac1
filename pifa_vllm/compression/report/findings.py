"""What a reader should know before trusting a compressed model, read off its report."""

from __future__ import annotations

import statistics

from pifa_vllm.compression.report.schema import CompressionReport, ModuleReport

# Rounding of the stored form: a few units in the last place of the dtype.
_WEIGHT_ERROR_LIMIT = {"float64": 1e-10, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
_COEFFICIENT_LIMIT = 2.0
_DENSITY_SHORTFALL = 0.002
_FLOW_ERROR_LIMIT = 0.5
_OUTLIER_FACTOR = 3.0


def findings(report: CompressionReport) -> list[str]:
    """List, in plain sentences, everything about a run that is out of the ordinary; empty if nothing is."""
    found: list[str] = []
    if not report.evaluation:
        found.append(
            "No evaluation on unseen text is recorded. Every error below is measured on the calibration tokens "
            "themselves; before using the model, measure the perplexity of text you care about with pifa-vllm eval "
            "--record."
        )
    found += _data(report)
    found += _budget(report)
    found += _rounding(report)
    if report.options.get("allocation") != "sensitivity":
        # There, large errors are where they cost little.
        found += _outliers(report.modules)
    if report.layers and report.layers[-1].flow_error > _FLOW_ERROR_LIMIT:
        found.append(
            f"After the last layer the hidden states are {report.layers[-1].flow_error:.0%} away from the dense "
            "model's. Expect a clear loss of quality; a higher density or more calibration tokens may help."
        )
    return found


def _data(report: CompressionReport) -> list[str]:
    samples, length = report.calibration.get("samples"), report.calibration.get("length")
    if not (isinstance(samples, int) and isinstance(length, int)) or report.method == "svd":
        return []
    widest = max((x.n for x in report.modules), default=0)
    tokens = samples * length
    if tokens < 4 * widest:
        return [
            f"{tokens:,} calibration tokens are few for inputs of {widest:,} dimensions: the statistics of some "
            "directions rest on little, and the errors below flatter the model. Use more samples."
        ]
    return []


def _budget(report: CompressionReport) -> list[str]:
    gap = report.density - report.density_target
    if gap > 1e-6:
        return [
            f"The model keeps more than was asked for: density {report.density:.4f}, asked for "
            f"{report.density_target:.4f}."
        ]
    if gap < -_DENSITY_SHORTFALL:
        return [
            f"The model falls short of its budget: density {report.density:.4f}, asked for "
            f"{report.density_target:.4f}. Ranks are multiples of a tile, which is coarse for small modules."
        ]
    return []


def _rounding(report: CompressionReport) -> list[str]:
    found: list[str] = []
    # Quantized numbers lose what they lose, and aim at more than the product of factors.
    if report.modules and not report.options.get("factors"):
        worst = max(report.modules, key=lambda x: x.weight_error)
        limit = _WEIGHT_ERROR_LIMIT.get(report.dtype, 0.0)
        if worst.weight_error > limit:
            found.append(
                f"Storing {worst.name} loses more than rounding explains: relative weight error "
                f"{worst.weight_error:.1e}, expected at most {limit:.0e} in {report.dtype}."
            )
        largest = max(report.modules, key=lambda x: x.max_coefficient)
        if largest.max_coefficient > _COEFFICIENT_LIMIT:
            found.append(
                f"The coefficients of {largest.name} reach {largest.max_coefficient:.1f}, expected at most "
                f"{_COEFFICIENT_LIMIT:g}: large ones amplify rounding in 16-bit storage."
            )
    return found


def _outliers(modules: list[ModuleReport]) -> list[str]:
    """Name modules whose error is far above what is usual among their kind."""
    outliers: list[ModuleReport] = []
    for kind in dict.fromkeys(x.kind for x in modules):
        same = [x for x in modules if x.kind == kind]
        usual = statistics.median(x.output_error for x in same)
        outliers += [x for x in same if x.output_error > max(_OUTLIER_FACTOR * usual, 0.05)]
    if not outliers:
        return []
    outliers.sort(key=lambda x: x.output_error, reverse=True)
    named = ", ".join(f"{x.name} ({x.output_error:.3f})" for x in outliers[:3])
    more = f" and {len(outliers) - 3} more" if len(outliers) > 3 else ""
    return [
        f"Output errors far above the usual of their kind: {named}{more}. A higher density for these modules in a "
        "recipe is worth a try."
    ]
