"""Any network as a DGL network: cut where a single tensor crosses, so that the heaviest module is as light as possible.

A network is traced to the list of its operations, in the order in which they run. A cut at place p of this list makes
operation p the first one of the next block.
"""

import inspect
import itertools

import torch
from torch import fx, nn

from .auxiliary import auxiliary_net
from .costs import BATCH, Meter, key, meta_images, on_meta, one_line_error
from .dgl_net import DGLNet
from .timing import Timer

ACTIVATIONS = {"relu", "relu6", "gelu", "silu", "hardswish", "sigmoid", "tanh", "elu", "leaky_relu", "selu", "mish"}
REARRANGING = {"flatten", "movedim", "permute", "reshape", "swapaxes", "transpose", "unflatten", "view"}


def decouple(model, num_modules, num_classes, image_size, balance="flops", nlin=3, mlp=3, cuts=None, timer=None):
    """Cut a network into `num_modules` modules and give each but the last one an auxiliary network.

    The cuts are the ones that make the heaviest module, its auxiliary network included, as light as possible. The last
    auxiliary network is the model's own classifier: its last layer with parameters, and the pooling, dropout or
    reshaping right before it. With one module nothing is added, and DGL is backprop.

    Args:
        model: images (B, 3, image_size, image_size) -> logits (B, num_classes), such as a torchvision classification
            model or an `nn.Sequential`, on any device. The result shares its parameters.
        num_modules: K.
        balance: what makes a module heavy: the "flops" of its forward pass, the "memory" that it keeps for the
            backward pass of a batch (without parameters), or the "time" of its training step, measured.
        nlin, mlp: 1x1 convolutions and hidden layers of the auxiliary networks: mlp-sr for a representation
            (B, C, H, W) or (B, side, side, C), an mlp of width D on the mean token for (B, N, D), and on (B, D). The
            hidden layers of mlp-sr have 4C units, which is a lot after wide layers. They count in the balance.
        cuts: those of an earlier result, to be made again whatever `balance` would find. Times differ from one
            measurement to the next: measure once, and give the cuts to other processes and later runs.
        timer: for "time"; by default a Timer on the parameters' device. torch's random numbers stay as they are.

    Returns:
        a DGLNet. Its blocks and its last auxiliary network, composed, are the model; parameters keep their names. Its
        attribute `cuts` has the names, in the traced graph, of the K - 1 operations after which it is cut.

    Raises:
        ValueError: the model cannot be traced, does not make logits (B, num_classes) of such images, or cannot be cut
            into that many modules (the message says into how many it can).
    """
    if balance not in ("flops", "memory", "time"):
        raise ValueError(f"balance is 'flops', 'memory' or 'time', not {balance!r}")
    network = Network(model, image_size, lambda shape, last: auxiliary_net(shape, num_classes, nlin, mlp, last))
    logits = network.values[network.nodes[-1]]
    if not torch.is_tensor(logits) or logits.shape != (BATCH, num_classes):
        found = (
            f"a {type(logits).__name__}" if not torch.is_tensor(logits) else f"(B, {str([*logits.shape[1:]])[1:-1]})"
        )
        raise ValueError(f"{type(model).__name__} gives {found} instead of logits (B, {num_classes})")
    parameter = next(model.parameters())
    if cuts is None:
        cuts = network.best_cuts(num_modules, balance, timer or Timer(parameter.device))
    else:
        cuts = network.find_cuts(num_modules, cuts)
    blocks = [network.part(*ends) for ends in itertools.pairwise([1, *cuts, network.head])]
    nets = [network.make_net(*network.layout(cut)).to(parameter.device, parameter.dtype) for cut in cuts]
    model = DGLNet(blocks, [*nets, network.part(network.head, network.end)])
    model.cuts = [network.crossing[cut].name for cut in cuts]
    return model


class Tracer(fx.Tracer):
    """Looks into modules, but not into layers, nor into modules whose forward pass asks whether they are training.

    Args:
        deep: whether to look into other modules than nn.Sequential.
    """

    proxy_buffer_attributes = True  # a buffer is read in each forward pass, not once while tracing

    def __init__(self, deep):
        super().__init__()
        self.deep = deep

    def is_leaf_module(self, module, name):
        bases = [c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules.")]
        if any(c.__module__ not in ("torch.nn.modules.container", "torch.nn.modules.module") for c in bases):
            return True  # a layer, or a subclass of one
        functions = [
            f for c in type(module).__mro__ if c not in bases for f in vars(c).values() if inspect.isfunction(f)
        ]
        if any("training" in f.__code__.co_names for f in functions):
            return True
        return not self.deep and not isinstance(module, nn.Sequential)


def trace(model):
    """The graph of the model's operations."""
    modes = {module: module.training for module in model.modules()}
    for deep in (True, False):
        try:
            training, evaluation = (Tracer(deep).trace(model.train(mode)) for mode in (True, False))
            break
        except Exception as error:  # the model's own code runs here, with stand-ins for tensors
            reason = str(error).strip().split("\n")[0]
        finally:
            for module, mode in modes.items():
                module.training = mode
    else:
        raise ValueError(f"{type(model).__name__} cannot be traced; an nn.Sequential of its parts can ({reason})")
    if str(training) != str(evaluation):
        raise ValueError(f"{type(model).__name__}.forward asks for self.training; do that in a submodule (nn.Dropout)")
    return training


class Network(fx.Interpreter):
    """A model as a list of operations: what each returns, costs and saves, and the places where it can be cut.

    Args:
        make_net: (shape of a representation, whether its channels are last) -> auxiliary network.
    """

    def __init__(self, model, image_size, make_net):
        graph = trace(model)
        super().__init__(on_meta(model), garbage_collect_values=False, graph=graph)
        self.model, self.image_size, self.make_net, self.nodes = model, image_size, make_net, list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.end = len(self.nodes) - 1  # the place before the output
        if [node.op for node in self.nodes].count("placeholder") != 1:
            raise ValueError(f"{type(model).__name__}.forward must take one tensor, the images")
        self.crossing = self.find_crossing()
        self.values, self.saved, self.versions, self.flops = {}, {}, {}, [0]
        with Meter(self.module) as self.meter, one_line_error(model, image_size):
            self.run(meta_images(self.module, image_size))
        self.dtype = next(self.module.parameters(), torch.empty(0)).dtype
        self.trains = {node: any(t.requires_grad for t in self.tensors(node)) for node in self.nodes}
        self.layers = [0, *itertools.accumulate(self.trains.values())]  # with parameters, before each place
        if not self.layers[-1]:
            raise ValueError(f"{type(model).__name__} has no parameters to train")
        places = self.possible_cuts()
        # The classifier begins after the last layer but one or, if that is no place for a cut, after an earlier one.
        self.head = max([1, *places], key=lambda p: (self.layers[p] < self.layers[-1], self.layers[p], -p))
        self.places = [p for p in places if 0 < self.layers[p] < self.layers[self.head]]

    def find_crossing(self):
        """The value that crosses each place where just one does."""
        last_use = {node: max([self.index[user] for user in node.users], default=-1) for node in self.nodes}
        alive, crossing = set(), {}
        for p, node in enumerate(self.nodes):
            alive = {value for value in alive if last_use[value] >= p}
            if len(alive) == 1:
                crossing[p] = next(iter(alive))
            alive.add(node)
        return crossing

    def run_node(self, node):
        self.meter.saved = self.saved[node] = {}
        self.values[node] = super().run_node(node)
        self.flops.append(self.meter.flops)
        p = self.index[node] + 1
        if torch.is_tensor(self.values.get(self.crossing.get(p))):
            self.versions[p] = self.values[self.crossing[p]]._version
        return self.values[node]

    def tensors(self, node):
        """The parameters and buffers of an operation."""
        if node.op == "call_module":
            module = self.fetch_attr(node.target)
            return [*module.parameters(), *module.buffers()]
        return [self.values[node]] if node.op == "get_attr" else []

    def possible_cuts(self):
        uses = {}  # by parameter or buffer: the operations that need it
        for i, node in enumerate(self.nodes):
            for tensor in self.tensors(node):
                uses.setdefault(id(tensor), []).append(i)
        shared = {p for used in uses.values() for p in range(used[0] + 1, used[-1] + 1)}  # would be in two modules
        places = [p for p in self.versions if p not in shared and self.is_place(p)]
        return list({self.crossing[p]: p for p in places}.values())  # the last of equivalent ones

    def is_place(self, p):
        value, producer = self.values[self.crossing[p]], self.crossing[p]
        if self.versions[p] != value._version:
            return False  # changed in place by the next block, but the auxiliary network needs it as it is
        if not (value.is_floating_point() and 2 <= value.dim() <= 4 and len(value) == BATCH and self.layout(p)):
            return False
        consumers = [user for user in producer.users if self.index[user] >= p]
        # Normalisation and activation stay with their layer
        if any(self.is_a(n, "activation") and self.name_of(n) != "multiheadattention" for n in consumers):
            return False
        layer = self.is_a(producer, "conv") or self.is_a(producer, "linear")
        return not (layer and any(self.is_a(n, "batchnorm") or self.is_a(n, "normalization") for n in consumers))

    def layout(self, p):
        """The shape of what crosses, and whether its channels are last, from the operations that follow.

        None where it is unclear: before a rearrangement, as of an attention's windows (B, window, pixel, D), or with
        tokens that are last, (B, D, N).
        """
        shape = self.values[self.crossing[p]].shape
        for node in self.nodes[p:] if len(shape) > 2 else []:
            value, layer = self.values[node], self.fetch_attr(node.target) if node.op == "call_module" else None
            if node.op == "get_attr" or not torch.is_tensor(value):
                continue
            if value.dim() == 2:  # pooled or flattened
                break
            if self.name_of(node) in REARRANGING:
                return None
            if type(layer) in (nn.LayerNorm, nn.Linear):  # and not a subclass for channels that are first
                width = layer.normalized_shape[-1] if type(layer) is nn.LayerNorm else layer.in_features
                square = len(shape) == 3 or shape[1] == shape[2]
                return (shape, True) if square and width == shape[-1] else None
            if any(self.is_a(node, kind) for kind in ("conv", "batchnorm", "pooling")):
                return (shape, False) if len(shape) == 4 else None
        return shape, False

    def name_of(self, node):
        """The name of the function, the method or the module's class, in lower case."""
        target = type(self.fetch_attr(node.target)) if node.op == "call_module" else node.target
        return getattr(target, "__name__", str(target)).lower().rstrip("_")

    def is_a(self, node, kind):
        """Whether an operation is a layer of a kind, which is the name of a file of torch.nn.modules."""
        if node.op == "call_module":
            return kind in {c.__module__.rpartition(".")[2] for c in type(self.fetch_attr(node.target)).__mro__}
        return kind == "activation" and self.name_of(node) in ACTIVATIONS

    def find_cuts(self, num_modules, names):
        """The places after the operations of these names."""
        places = {self.crossing[p].name: p for p in self.places}
        if len(names) != num_modules - 1:
            raise ValueError(f"{num_modules} modules have {num_modules - 1} cuts, not {len(names)}")
        if unknown := [name for name in names if name not in places]:
            raise ValueError(f"{type(self.model).__name__} cannot be cut after {', '.join(unknown)}")
        return [places[name] for name in names]

    def best_cuts(self, num_modules, balance, timer):
        """The num_modules - 1 places whose heaviest module is the lightest."""
        largest = 1 + len({self.layers[p] for p in self.places})
        if not 1 <= num_modules <= largest:
            possible = f"1 to {largest} modules" if largest > 1 else "1 module only"
            raise ValueError(f"{type(self.model).__name__} can be cut into {possible}, not {num_modules}")
        if num_modules == 1:
            return []
        heaviest, cuts = self.lightest(num_modules, self.weights("memory" if balance == "memory" else "flops"))
        if balance == "time":
            with torch.random.fork_rng([timer.device] if timer.device.type == "cuda" else []):
                # An auxiliary network that is heavier than any module should be, as after a flattened image, is no
                # choice, and may not fit into memory
                _, cuts = self.lightest(num_modules, self.seconds(timer, 2 * heaviest))
        return cuts

    def lightest(self, num_modules, weights):
        """The heaviest module's weight and the cuts for which it is the least, by dynamic programming."""
        best = {1: (0, 0, [])}  # of what is before each place: heaviest module, sum of the modules, cuts
        for k in range(1, num_modules + 1):
            shorter, best = best, {}
            for b in self.places if k < num_modules else [self.end]:
                options = [
                    (max(heaviest, weights[a, b]), total + weights[a, b], a)
                    for a, (heaviest, total, _) in shorter.items()
                    if (a, b) in weights and self.layers[a] < self.layers[min(b, self.head)]
                ]
                if options:
                    heaviest, total, a = min(options)
                    best[b] = heaviest, total, [*shorter[a][2], b]
        heaviest, _, ends = best[self.end]
        return heaviest, ends[:-1]

    def weights(self, balance):
        """The FLOPs of the module between any two places, or the bytes that it saves for the backward pass."""
        by_layout, self.nets, weights = {}, {}, {}
        for p in self.places:
            layout = self.layout(p)
            self.nets[p] = by_layout[layout] = by_layout.get(layout) or self.weigh_net(*layout)
        for a in [1, *self.places]:
            with_gradient, saved = set(), {}
            for p in range(a, self.end + 1):
                if p in self.nets or p == self.end:
                    flops, nbytes, saves_input = self.nets.get(p, (0, 0, False))
                    if balance == "flops":
                        weights[a, p] = self.flops[p] - self.flops[a] + flops
                    else:
                        x = self.values[self.crossing[p]]
                        twice = key(x) in saved or not saves_input
                        weights[a, p] = sum(saved.values()) + nbytes + (0 if twice else x.untyped_storage().nbytes())
                node = self.nodes[p]
                # The module's input needs no gradient, so nothing is saved before the first layer
                if self.trains[node] or not with_gradient.isdisjoint(node.all_input_nodes):
                    with_gradient.add(node)
                    saved.update(self.saved[node])
        return weights

    def seconds(self, timer, limit):
        """The seconds of a training step of the module between any two places, without those beyond a limit of FLOPs.

        Sums of what is between neighbouring places, each timed once as a module's beginning, where its input needs no
        gradient, and once as its continuation; and of the auxiliary networks, each timed once.
        """
        places = [p for p in self.places if self.nets[p][0] <= limit]
        segments, nets, x, weights = [], {}, timer.images(self.image_size, self.dtype), {}
        for a, b in itertools.pairwise([1, *places, self.end]):
            part = self.part(a, b)
            inside = timer(part, x, True)[0] if a > 1 else None
            begins, x = timer(part, x, False)
            segments.append((a, b, begins, inside))
            if b < self.end and (layout := self.layout(b)) not in nets:
                nets[layout] = timer(self.make_net(*layout).to(self.dtype), x, True)[0]
        for i, start in enumerate([1, *places]):
            total = 0.0
            for a, b, begins, inside in segments[i:]:
                total += inside if self.layers[start] < self.layers[a] else begins
                weights[start, b] = total + (nets[self.layout(b)] if b < self.end else 0.0)
        return weights

    def weigh_net(self, shape, channels_last):
        """An auxiliary network's FLOPs, the bytes that it saves without its input, and whether it saves its input."""
        with torch.device("meta"):  # no random numbers are drawn
            net = self.make_net(shape, channels_last).to(self.dtype)
        x = torch.empty(shape, device="meta", dtype=self.dtype, requires_grad=True)
        with Meter(net) as meter:
            net(x)
        return meter.flops, sum(n for k, n in meter.saved.items() if k != key(x)), key(x) in meter.saved

    def part(self, start, end):
        """What is between two places, as a module."""
        graph = fx.Graph()
        copies = {self.crossing[start]: graph.placeholder("x")}
        for node in self.nodes[start:end]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[self.crossing[end]])
        return fx.GraphModule(self.model, graph)
