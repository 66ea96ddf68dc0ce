"""What a table's own header says against trusting it; needs no torch."""

from fbnas.latency.table import LatencyTable

NOISY = 0.05  # test against retest
FAILING_ERROR = 0.05  # of whole networks that the correction was not fitted on
FAILING_RANKS = 0.9  # Spearman
AGAIN = "profile into a new file while the machine is quiet"  # a table's own rows are kept


def doubts(table: LatencyTable) -> list[str]:
    """Return a line for each reason to doubt predictions of the table, none where all is well.

    Reasons: measured on a busy machine, rows that are missing because they failed, never held
    against whole networks, or blocks that do not add up to them.
    """
    found = [*_noise(table)]
    failed = table.header.get("failed")
    if failed:
        found.append(f"{table.name} lacks what failed on the device: {failed}")
    return [*found, *_additivity(table)]


def _noise(table: LatencyTable) -> list[str]:
    if table.noise_floor > NOISY:
        return [
            f"{table.name} has a noise floor of {100 * table.noise_floor:.1f} % (test against "
            f"retest; up to {100 * NOISY:.0f} % can be trusted): {AGAIN}"
        ]
    disturbance = busy(table)
    return [f"{table.name} was measured on {disturbance}: {AGAIN}"] if disturbance else []


def busy(table: LatencyTable) -> str:
    """Say that the machine was busy, and how; nothing where it was quiet."""
    why = table.quiet.removeprefix("no").strip(" ()")
    return "" if table.quiet == "yes" else f"a busy machine ({why})"


def _classes(table: LatencyTable) -> str:
    """Return the option that says for how many classes the table's classifier is."""
    found = [x.shape.out_channels for x in table.entries if x.shape.block == "classifier"]
    return f" classes={found[0]}" if found else ""


def _additivity(table: LatencyTable) -> list[str]:
    error = table.header.get("calibration_error")
    ranks = table.header.get("calibration_spearman")
    if "calibration" not in table.header:
        return [
            f"{table.name} was never held against whole networks, so nobody knows how well its "
            f"blocks add up: fbnas calibrate table={table.path or 'FILE'} space="
            f"{(table.header.get('space', '') or 'NAME').split()[0]}{_classes(table)}"
        ]
    if error is None:
        return []
    noise = float(table.header.get("calibration_noise_floor", "0"))
    disordered = ranks is not None and float(ranks) < FAILING_RANKS
    if float(error) > max(FAILING_ERROR, 2 * noise) or disordered:
        order = "" if ranks is None else f", Spearman {float(ranks):.3f}"
        return [
            f"blocks do not add up on {table.device}: whole networks are predicted "
            f"{100 * float(error):.1f} % off{order} (noise floor {100 * noise:.1f} %), so measure "
            "candidates before you choose one"
        ]
    return []
