"""A pass in a process of its own: reading_run.py FOLDER; two workers, a batch an image.

Prints the workers' ids, then a line per batch. When told to stop it still reads what is left.
"""

import multiprocessing
import sys
import time

from fbnas.training import batches, load_data, stop_on_signal


def main(folder: str) -> None:
    data = load_data("image_folder", path=folder, memory_mb=0, workers=2)
    with stop_on_signal() as stop:
        for step, _ in enumerate(batches(data.train, 1, mean=data.mean, std=data.std)):
            if step == 0:
                print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            print("stopping" if stop() else "going on", flush=True)
            time.sleep(0 if stop() else 0.2)


if __name__ == "__main__":
    main(sys.argv[1])
