"""How good predictions are: the figures that `evaluate`, training and export report."""

from collections.abc import Sequence
from typing import Any

from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support


def score(truth: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro precision, recall and F1 (all 0 to 1), the same per class, and the confusion matrix.

    The matrix has a row per true label and a column per predicted one, in the order of `labels`.
    """
    numbers = list(range(len(labels)))
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, predicted, labels=numbers, zero_division=0.0
    )
    return {
        "texts": len(truth),
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1.mean()),
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "per_class": {
            label: {
                "precision": float(precision[n]),
                "recall": float(recall[n]),
                "f1": float(f1[n]),
                "texts": int(support[n]),
            }
            for n, label in enumerate(labels)
        },
        "confusion_matrix": confusion_matrix(truth, predicted, labels=numbers).tolist(),
    }
