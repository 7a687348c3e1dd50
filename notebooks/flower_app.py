"""A Flower app for CIFAR-10: clients that train on their images, with Opacus if they want to, and a
server that averages what they send and keeps it.

`federate` runs it on this machine. An own Flower app takes `CuriousFedAvg` in place of `FedAvg`.
"""

import logging
import math
import os
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gipip

# Both read them when they are imported: nothing is reported, and Ray listens to this machine only.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

try:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation
    from opacus import PrivacyEngine
except ImportError as error:
    advice = 'pip install "gipip[flwr,dp]"'
    raise ImportError(f"This app needs Flower and Opacus ({error}): {advice}.") from error

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
logging.getLogger("flwr").propagate = False  # it has a handler of its own: no line twice
client_app = ClientApp()


def build_network() -> nn.Module:
    """Any network that gives logits; Opacus asks for one without BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 120),
        nn.ReLU(),
        nn.Linear(120, 10),
    )


def private_images(count: int) -> gipip.LabeledImages:
    """A client's. All clients begin with the same ones, so that they can be compared."""
    return gipip.load_dataset("cifar10").private_pool[:count]


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A client's round: the server's weights come in, and go out after local training."""
    client, config = context.node_config["partition-id"], message.content["config"]
    torch.manual_seed(client)  # the same shuffle and noise at every run of the notebook
    images, network = private_images(config["images"][client]), build_network()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    epsilon = fit(network, images, config, config["epochs"][client], config["noise"][client])
    reply = {
        "arrays": ArrayRecord(network.state_dict()),
        "metrics": MetricRecord({"num-examples": len(images)}),
        "client": ConfigRecord({"number": client, "epsilon": epsilon}),
    }
    return Message(RecordDict(reply), reply_to=message)


def fit(network: nn.Module, images: gipip.LabeledImages, config, epochs: int, noise: float):
    """SGD on shuffled mini-batches; where there is `noise`, as Opacus does it. Gives the ε of
    this round at δ = 10⁻⁵.
    """
    inputs = gipip.client_model(network, MEAN, STD).normalize(images.images)
    dataset = TensorDataset(inputs, images.labels)
    loader = DataLoader(dataset, batch_size=config["batch-size"], shuffle=True)
    optimizer, engine = torch.optim.SGD(network.parameters(), lr=config["rate"]), None
    if noise:
        engine = PrivacyEngine(accountant="rdp")
        network, optimizer, loader = engine.make_private(
            module=network,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=noise,
            max_grad_norm=1.0,
        )
    for _ in range(epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs), labels).backward()
            optimizer.step()
    return engine.get_epsilon(1e-5) if engine else math.inf


class CuriousFedAvg(FedAvg):
    """Federated averaging that also keeps what passes through the server: by round the
    weights `sent`, and by round and node the replies `received`.
    """

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.sent: dict[int, dict] = {}
        self.received: dict[tuple[int, int], RecordDict] = {}

    def configure_train(self, server_round, arrays, config, grid) -> Iterable[Message]:
        self.sent[server_round] = arrays.to_torch_state_dict()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            if reply.has_content():
                self.received[server_round, reply.metadata.src_node_id] = reply.content
        return super().aggregate_train(server_round, replies)


def federate(clients: int, config: dict) -> CuriousFedAvg:
    """One round of so many clients, simulated on this machine; gives the server's strategy."""
    torch.manual_seed(0)
    weights = ArrayRecord(build_network().state_dict())
    strategy, server_app = CuriousFedAvg(fraction_evaluate=0), ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy.start(grid, weights, num_rounds=1, train_config=ConfigRecord(config))

    one_by_one = {"init_args": {"num_cpus": 1}, "client_resources": {"num_cpus": 1}}
    run_simulation(server_app, client_app, clients, backend_config=one_by_one)
    return strategy
