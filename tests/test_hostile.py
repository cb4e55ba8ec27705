"""Files from strangers' drives: no code runs, nothing outside the data root is read, memory and
time stay bounded, the message names the file. Every bad file is made here, and read in a process of
its own that is watched."""

import ast, fcntl, gc, hashlib, json, os, pickle, resource, select, socket, struct
import subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from small import known
from typer.testing import CliRunner

from mculora.use.cli import app
from mculora.basics.dialogues import Task
from mculora.basics.method import create, methods
from mculora.experiments.runs import load_method, save_method

ROOT = Path(__file__).resolve().parent.parent

# --- the watched process: `python test_hostile.py FOLDER` reads every FOLDER/<case>/ in a fork ---

HARM = (
    'os.system',
    'os.exec',
    'os.posix_spawn',
    'os.spawn',
    'os.fork',
    'os.kill',
    'subprocess.',
    'exec',
    'import',
    'ctypes.',
    'socket.',
    'pickle.find_class',
    'marshal.',
    'code.',
    'shutil.',
    'os.remove',
    'os.rename',
    'os.link',
    'os.symlink',
    'webbrowser.',
)
EYES = ('open', 'os.listdir', 'os.scandir')


def readers():
    from mculora.basics import masking
    from mculora.training import recording as observation
    from mculora.data import pickles
    from mculora.experiments import results
    from mculora.experiments import runs
    from mculora.data import sources
    from mculora.basics.dialogues import DataError, random_dialogues

    def whole(read):  # the rows, if there are no problems
        if read[1]:
            raise DataError('; '.join(read[1]))
        return read[0]

    return {
        'pickle': lambda p: pickles.read_pickle(p / 'x.pkl'),
        'npy': lambda p: sources.read_npy(p / 'x.npy'),
        'labels': lambda p: whole(sources.read_labels(p, 'mosi')),
        'layout': lambda p: sources.load_layout(
            p / 'data', 'mosi', cache_dir=p / 'data' / 'cache', progress=False
        ),
        'dialogues': lambda p: sources.load_dialogues(p / 'x.safetensors'),
        'mask': lambda p: masking.load_mask(p / 'x.safetensors', random_dialogues()),
        'model': runs.load_method,
        'observed': lambda p: observation.load_observed(p / 'x.safetensors'),
        'result': results.read_result,
        'control': lambda p: pickle.loads((p / 'x.pkl').read_bytes()),
        'control open': lambda p: (p / '..' / 'control' / 'x.pkl').read_bytes(),
        'control death': lambda p: os.kill(os.getpid(), 9),
    }


SEEN, INSIDE = [], []  # of the case that is being read: what happened, and where it may look


def look(event, args):
    if event.startswith(HARM):
        SEEN.append(f'{event} {args!r:.80}')
    elif (
        event in EYES
        and isinstance(args[0], (str, bytes))
        and not f'{os.path.realpath(os.fsdecode(args[0]))}/'.startswith(tuple(INSIDE))
    ):
        SEEN.append(f'{event} {args[0]!r:.80}')


def limit(what, more):
    "From what is used so far; the hard limit stays, since the next case needs another."
    resource.setrlimit(what, (more, resource.getrlimit(what)[1]))


def watched(case, read):
    "Read one case, and say what happened."
    os.chdir(case)
    INSIDE[:] = os.path.realpath(case) + '/', f'{ROOT}/mculora/'
    used = int(Path('/proc/self/statm').read_text().split()[0]) * os.sysconf('SC_PAGE_SIZE')
    limit(resource.RLIMIT_AS, used + 2**31)
    limit(resource.RLIMIT_CPU, int(time.process_time()) + 31)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    SEEN.clear()
    try:
        outcome, message = 'value', repr(type(read(Path(case))))
    except BaseException as e:
        outcome, message = type(e).__name__, str(e)[:4000]
    events = list(SEEN)
    return dict(
        outcome=outcome,
        message=message,
        events=events[:9],
        seconds=time.process_time() - start,
        mb=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    )


def one_after_the_other(cases, read, to):
    """In a fork: a line for each case, until one did something or took memory; the next ones are
    then another fork's."""
    sys.addaudithook(look)
    for case in cases:
        kind = (case / 'kind').read_text()
        r = watched(case, read[kind])
        to.write(json.dumps(r) + '\n')
        to.flush()
        if r['events'] or r['mb'] > 8:
            break
    os._exit(0)


def worked(pid):
    "CPU time of a process so far, in ticks."
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[11:13]


def answers(pid, r):
    """What a fork says of its cases; at the end, of one that it did not survive. It hangs if it
    does nothing: how long work takes is up to the machine, and limited in CPU seconds."""
    nothing, before = dict(message='', events=[], seconds=90, mb=0), None
    # without a buffer, which would hide lines from `select`
    with open(r, 'rb', 0) as lines:
        while True:
            if not select.select([lines], [], [], 45)[0]:
                if (now := worked(pid)) == before:
                    os.kill(pid, 9)
                    os.waitpid(pid, 0)
                    yield dict(outcome='hangs', **nothing)
                    return
                before = now
            elif line := lines.readline():
                yield json.loads(line)
            else:
                if status := os.waitpid(pid, 0)[1]:
                    yield dict(outcome=f'dies of {status}', **nothing)
                return


def worker(folder):
    import copyreg, warnings

    warnings.simplefilter('ignore')
    read = readers()
    # some other library used the registry
    copyreg.add_extension('os', 'system', 1)
    pickle.loads(b'\x80\x02\x82\x01.')
    # and so that nothing is imported for the first time later on
    methods()
    read['layout'](Path(folder).parent / 'first' / 'sound')
    # the collector of a fork would touch, and so copy, all of it
    gc.freeze()
    cases = sorted(Path(folder).iterdir())
    while cases:
        r, w = os.pipe()
        if not (pid := os.fork()):
            os.close(r)
            one_after_the_other(cases, read, open(w, 'w'))
        os.close(w)
        for said in answers(pid, r):
            case = cases.pop(0)
            kind = (case / 'kind').read_text()
            print(json.dumps([case.name, dict(said, kind=kind)]), flush=True)


if __name__ == '__main__':
    worker(sys.argv[1])
    sys.exit()

# --- pickles ---

CASES = {}  # name -> (kind, how its folder is filled)
EVERY_WAY = set()  # those of the long campaign alone


def text(x):
    return b'X' + struct.pack('<I', len(x := x.encode('utf8', 'surrogatepass'))) + x


def short(x):
    return b'\x8c' + bytes([len(x := x.encode())]) + x


def number(n):
    return b'J' + struct.pack('<i', n)


def get(i):
    return b'j' + struct.pack('<I', i)


def put(i):
    return b'r' + struct.pack('<I', i)


def long(n):
    return b'\x8b' + struct.pack('<i', len(x := n.to_bytes(n.bit_length() // 8 + 1, 'little'))) + x


def pickled(name, data, kind='pickle', file='x.pkl'):
    CASES[f'{kind}: {name}'] = (
        kind,
        lambda p: (p / file).write_bytes(data() if callable(data) else data),
    )


COMMAND = 'touch harm'
GADGETS = {
    full: args
    for args, names in {
        (COMMAND,): (
            'os.system posix.system nt.system os.popen subprocess.Popen subprocess.call '
            'subprocess.run subprocess.getoutput commands.getoutput pty.spawn '
            'asyncio.create_subprocess_shell platform.popen'
        ),
        ("open('harm', 'w')",): 'builtins.eval builtins.exec __builtin__.eval __builtin__.execfile '
        'builtins.compile timeit.timeit cProfile.run profile.run pdb.run trace.Trace.run '
        'bdb.Bdb.run code.interact doctest.debug_script '
        'numpy.testing._private.utils.runstring numpy.testing.rundocs '
        'numpy.f2py.crackfortran.myeval numpy.core.numeric.eval pandas.eval '
        'pandas.core.computation.eval.eval torch.jit.unsupported_tensor_ops.execWrapper',
        (
            'harm',
            'w',
        ): (
            'builtins.open io.open codecs.open _io.FileIO pathlib.Path.open '
            'tempfile.NamedTemporaryFile numpy.memmap numpy.DataSource.open'
        ),
        ('x.pkl',): 'numpy.load numpy.fromfile numpy.core.multiarray.fromfile numpy.loadtxt '
        'numpy.genfromtxt numpy.ctypeslib.load_library numpy.lib.npyio.load torch.load '
        'torch.hub.load torch.package.PackageImporter torch.jit.load pandas.read_pickle '
        'joblib.load '
        'dill.load cloudpickle.load shelve.open runpy.run_path imp.load_source '
        'linecache.getlines ctypes.CDLL shutil.rmtree os.remove os.listdir builtins.input '
        'sklearn.datasets.load_files',
        ('os',): (
            'builtins.__import__ importlib.import_module pydoc.locate pkgutil.resolve_name '
            'zipimport.zipimporter sys.modules.__getitem__'
        ),
        (b'cos\nsystem\n.',): (
            'pickle.loads _pickle.loads pickle.Unpickler marshal.loads types.CodeType '
            'types.FunctionType builtins.bytes.fromhex'
        ),
        (
            '',
            'join',
        ): (
            'builtins.getattr builtins.setattr operator.attrgetter operator.methodcaller '
            'functools.partial functools.reduce builtins.map copyreg._reconstructor '
            'copyreg.__newobj__ copyreg.__newobj_ex__ builtins.type builtins.object '
            'builtins.super'
        ),
        (2**31,): (
            'builtins.bytearray builtins.range builtins.bytes.zfill numpy.zeros numpy.ones '
            'numpy.empty numpy.arange numpy.core.multiarray.empty numpy.core.multiarray.zeros '
            'array.array torch.zeros builtins.list.__mul__'
        ),
        (0,): (
            'os._exit sys.exit builtins.exit signal.raise_signal os.abort os.fork '
            'builtins.breakpoint _thread.interrupt_main faulthandler._sigsegv'
        ),
    }.items()
    for full in names.split()
}
WAYS = {  # how a pickle asks for a call: (module, name, the arguments pickled)
    'REDUCE, text': lambda m, n, a: b'c%s\n%s\n%sR.' % (m, n, a),
    'REDUCE': lambda m, n, a: b'\x80\x02c%s\n%s\n%sR.' % (m, n, a),
    'STACK_GLOBAL': lambda m, n, a: (
        b'\x80\x04' + short(m.decode()) + short(n.decode()) + b'\x93' + a + b'R.'
    ),
    'NEWOBJ': lambda m, n, a: b'\x80\x02c%s\n%s\n%s\x81.' % (m, n, a),
    'NEWOBJ_EX': lambda m, n, a: b'\x80\x04c%s\n%s\n%s}\x92.' % (m, n, a),
    'INST': lambda m, n, a: (
        b'(' + a[1:-1] + b'i%s\n%s\n.' % (m, n) if a[:1] == b'(' else b'(i%s\n%s\n.' % (m, n)
    ),
    'OBJ': lambda m, n, a: (
        b'\x80\x02(c%s\n%s\n' % (m, n) + (a[1:-1] if a[:1] == b'(' else b'') + b'o.'
    ),
    'BUILD': lambda m, n, a: b'\x80\x02]}' + text('__setstate__') + b'c%s\n%s\nsb.' % (m, n),
    'in a list that is whole': lambda m, n, a: (
        b'\x80\x02(' + b'}' * 4 + b'\x8f\x8f' + b'c%s\n%s\n%sRl.' % (m, n, a)
    ),
}
for i, (full, args) in enumerate(GADGETS.items()):
    module, _, name = full.rpartition('.')
    # a tuple, without PROTO and STOP
    said = (
        b'(' + pickle.dumps(args, 1)[1:].rpartition(b't')[0] + b't'
        if len(args) > 1
        else pickle.dumps(args, 2)[2:-1]
    )
    said = b'(' + b''.join(pickle.dumps(a, 2)[2:-1].split(b'q\x00')[0] for a in args) + b't'
    for j, (way, make) in enumerate(WAYS.items()):
        pickled(f'{full} by {way}', make(module.encode(), name.encode(), said))
        if (i - j) % len(WAYS):
            EVERY_WAY.add(f'pickle: {full} by {way}')

ARRAY = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR'


def dtype(code):
    return b'cnumpy\ndtype\n(U' + bytes([len(code)]) + code + b'K\x00K\x01tR'


def state(shape, code, data):
    return b'(K\x01' + shape + dtype(code) + b'\x89' + data + b'tb'


def frozen(n):  # two sets that are equal and 2**n comparisons apart
    def one(base):
        return (
            b'(K\x05\x91'
            + put(base)
            + b''.join(
                b'0('
                + get(base + i)
                + b'K\x01\x86'
                + get(base + i)
                + b'K\x02\x86\x91'
                + put(base + i + 1)
                for i in range(n)
            )
            + b'0'
        )

    return (
        b'\x80\x04' + one(0) + one(n + 1) + b'}' + get(n) + b'K\x01s' + get(2 * n + 1) + b'K\x01s.'
    )


def objects(n):
    return (
        b'\x80\x02'
        + ARRAY
        + put(0)
        + b''.join(
            b'0' + ARRAY + state(b'K\x02\x85', b'O8', b'(' + get(i) * 2 + b'l') + put(i + 1)
            for i in range(n)
        )
        + b'.'
    )


def laughs(n):
    return (
        b'\x80\x02('
        + text('ha') * 10
        + b'l'
        + put(0)
        + b''.join(b'0(' + get(i) * 10 + b'l' + put(i + 1) for i in range(n))
    )


S, MANY = 2**61 - 1, 100_000

for name, data in {
    'sets in sets, compared for ever': lambda: frozen(60),
    'arrays in arrays, compared for ever': lambda: objects(60),
    'numbers of one hash': lambda: (
        b'\x80\x04\x8f(' + b''.join(long(i * S) for i in range(1, 20_000)) + b'\x90.'
    ),
    'numbers of one hash as keys': lambda: (
        b'\x80\x04}(' + b''.join(long(i * S) + b'N' for i in range(1, 20_000)) + b'u.'
    ),
    'pairs of one hash as keys': lambda: (
        b'\x80\x04}(' + b''.join(number(i) + number(-i) + b'\x86N' for i in range(20_000)) + b'u.'
    ),
    'long texts as keys': lambda: (
        b'\x80\x04'
        + text('a' * 2**20)
        + put(0)
        + text('a' * 2**20)
        + put(1)
        + b'}'
        + (get(0) + b'Ns' + get(1) + b'Ns') * 20_000
        + b'.'
    ),
    'a list as a key': b'\x80\x02}]Ns.',
    'a tuple as a key': b'\x80\x02}K\x01\x85Ns.',
    'a thousand million laughs in a set': lambda: laughs(9) + b'\x85(' + get(9) + b'\x91.',
    'very many empty sets': b'\x80\x04(' + b'\x8f' * MANY + b't.',
    'very many empty dictionaries': b'\x80\x02(' + b'}' * 3 * MANY + b't.',
    'very many marks': b'(' * MANY + b't' * MANY + b'.',
    'very many memos': b'\x80\x04N' + b'\x94' * MANY + b'.',
    'very many types': lambda: (
        b'\x80\x02cnumpy\ndtype\n'
        + put(0)
        + b'('
        + text('S7')
        + put(1)
        + b'('
        + (get(0) + get(1) + b'\x85R') * MANY
        + b't.'
    ),
    'very many arrays': lambda: (
        b'\x80\x02cnumpy\nndarray\n' + put(0) + b'(' + (b'h\x00)R') * MANY + b't.'
    ),
    'a scalar of a megabyte, again and again': lambda: (
        b'\x80\x02cnumpy.core.multiarray\nscalar\n'
        + put(0)
        + dtype(b'S1000000')
        + put(1)
        + b'B'
        + struct.pack('<I', 10**6)
        + bytes(10**6)
        + put(2)
        + b'('
        + (get(0) + get(1) + get(2) + b'\x86R') * 3000
        + b't.'
    ),
    'a text made bytes again and again': lambda: (
        b'\x80\x02c_codecs\nencode\n'
        + put(0)
        + text('a' * 2**20)
        + put(1)
        + b'('
        + (get(0) + get(1) + b'U\x06latin1\x86R') * 3000
        + b't.'
    ),
    'a list copied again and again': lambda: (
        b'\x80\x02cbuiltins\nset\n'
        + put(0)
        + b'('
        + b''.join(map(number, range(5000)))
        + b'l'
        + put(1)
        + b'('
        + (get(0) + get(1) + b'\x85R') * 3000
        + b't.'
    ),
    'a set of an array': b'\x80\x02cbuiltins\nset\n' + ARRAY + b'\x85R.',
    'a shape of two huge numbers': lambda: (
        b'\x80\x02'
        + ARRAY
        + state(b'(' + long(2 ** (8 * 10**6)) * 2 + b't', b'f8', b'U\x08abcdefgh')
        + b'.'
    ),
    'a shape of many numbers': lambda: (
        b'\x80\x02'
        + ARRAY
        + state(b'(' + number(2**31 - 1) * 100_000 + b't', b'f8', b'U\x08abcdefgh')
        + b'.'
    ),
    'a shape that is an array': lambda: (
        b'\x80\x02' + ARRAY + put(0) + b'0' + ARRAY + state(get(0), b'f8', b'U\x08abcdefgh') + b'.'
    ),
    'a shape below nothing': b'\x80\x02'
    + ARRAY
    + state(number(-1) * 2 + b'\x86', b'f8', b'U\x08abcdefgh')
    + b'.',
    'a terabyte of nothing': b'\x80\x02'
    + ARRAY
    + state(b'\x8a\x06' + (10**12).to_bytes(6, 'little') + b'\x85', b'S0', b'U\x00')
    + b'.',
    'a state twice': b'\x80\x02'
    + ARRAY
    + (state(b'K\x01\x85', b'f8', b'U\x08abcdefgh')) * 2
    + b'.',
    'items of an array': b'\x80\x02' + ARRAY + b'K\x00K\x01s.',
    'a state of a list': b'\x80\x02]}b.',
    'a state of slots': b'\x80\x02]N}\x86b.',
    'a state of an ordered dictionary': b'\x80\x02ccollections\nOrderedDict\n)R}'
    + text('__class__')
    + b'K\x01sb.',
    **{
        f'{op} of {n} bytes': data + struct.pack('<Q', n) + b'abc.'
        for op, data in {
            'BINBYTES8': b'\x80\x04\x8e',
            'BINUNICODE8': b'\x80\x04\x8d',
            'BYTEARRAY8': b'\x80\x05\x96',
            'FRAME': b'\x80\x04\x95',
        }.items()
        for n in (2**32, 2**40, 2**62, 2**64 - 1)
    },
    'BINBYTES of 4 GB': b'\x80\x03B' + struct.pack('<I', 2**32 - 1) + b'abc.',
    'LONG4 of 2 GB': b'\x80\x02\x8b' + struct.pack('<i', 2**31 - 1) + b'abc.',
    'LONG4 below nothing': b'\x80\x02\x8b' + struct.pack('<i', -5) + b'abc.',
    'a number of a million digits': b'I' + b'9' * 10**6 + b'\n.',
    'a long number of a million digits': b'L' + b'9' * 10**6 + b'L\n.',
    'a frame in a frame': b'\x80\x04\x95' + struct.pack('<Q', 9) + b'\x95' + bytes(8) + b'.',
    'PERSID': b'Pos.system\n.',
    'BINPERSID': b'\x80\x02' + text('os.system') + b'Q.',
    **{
        f'EXT{len(code)}': b'\x80\x02' + op + code + text(COMMAND) + b'\x85R.'
        for op, code in ((b'\x82', b'\x01'), (b'\x83', b'\x01\0'), (b'\x84', b'\x01\0\0\0'))
    },
    'NEXT_BUFFER': b'\x80\x05\x97.',
    'READONLY_BUFFER': b'\x80\x05C\x01a\x98.',
    'STACK_GLOBAL of numbers': b'\x80\x04K\x01K\x02\x93.',
    'STACK_GLOBAL of lists': b'\x80\x04]]\x93.',
    'a method of an array': b'\x80\x04' + short('numpy') + short('ndarray.tofile') + b'\x93.',
    'a name within a name': b'\x80\x04' + short('builtins') + short('set.__class__') + b'\x93.',
    'a function of the reader': b'c__main__\nworker\n.',
    'the reader itself': b'cmculora.pickles\n_Unpickler\n.',
    'a name of two lines': b'\x80\x04'
    + short('os\nall is well')
    + short('\x1b[31msystem')
    + b'\x93.',
    'a name of a megabyte': lambda: b'c' + b'm' * 2**20 + b'\nn\n.',
    'a bytes subclass': b'\x80\x02cnumpy\nstr_\n' + text('a') + b'\x85R.',
    'a call of a text': b'\x80\x02' + text('os.system') + b')R.',
    'a call of a number': b'\x80\x02K\x01)R.',
    'a new object of a number': b'\x80\x02K\x01)\x81.',
    'protocol 255': b'\x80\xff].',
    'nothing': b'',
    'a stop alone': b'.',
    'no stop': b'\x80\x02K\x01',
    'a zip file': b'PK\x03\x04' + bytes(99),
    'zeros': bytes(9999),
}.items():
    pickled(name, data)

# read without complaint, and nothing comes of it
HARMLESS = {
    'pickle: ' + name
    for name in (
        'lists 50000 deep',
        'tuples 50000 deep',
        'an index of 4 GB',
        'very many marks',
        'very many types',
    )
}
pickled('lists 50000 deep', lambda: b']' * 50_000 + b'a' * 49_999 + b'.')
pickled('tuples 50000 deep', lambda: b')' + b'\x85' * 50_000 + b'.')
pickled('a list in itself', b']p0\ng0\na.')
pickled('a dictionary in itself', b'}p0\nNg0\ns.')
pickled('a thousand million laughs', lambda: laughs(9) + b'.')
pickled('an index of 4 GB', b'\x80\x02]' + put(2**32 - 1) + b'.')


def sparse(path, size, data=b''):
    path.write_bytes(data)
    os.truncate(path, size)


CASES['pickle: a terabyte'] = 'pickle', lambda p: sparse(p / 'x.pkl', 2**40, b'\x80\x02]')
CASES['pickle: a pipe'] = 'pickle', lambda p: os.mkfifo(p / 'x.pkl')
CASES['pickle: a folder'] = 'pickle', lambda p: (p / 'x.pkl').mkdir()

# --- label tables of the wrong content: the pickle is sound, what it says is not ---

LABELS = 'CMUMOSI_features_raw_2way.pkl'


def tables(**change):  # seven sound tables, some of them changed
    t = (
        dict(
            ids={'v': ['v_0', 'v_1']},
            labels={'v': [1.0, -1.0]},
            speakers={'v': ['', '']},
            texts={'v': ['', '']},
            train={'v'},
            val=set(),
            test=set(),
        )
        | change
    )
    return pickle.dumps([*t.values()][:7], 4)


for name, data in {
    'laughs in place of everything': lambda: laughs(3) + b'(' + get(3) * 7 + b'l.',
    'itself in place of everything': b'(lp0\n(g0\ng0\ng0\ng0\ng0\ng0\ng0\nl.',
    'arrays among the names of a part': tables(train=[np.arange(3), 'w']),
    'lists among the names of a part': tables(train=[[1], {}, None]),
    'numbers for dialogues': tables(ids={5: ['v_0']}),
    'None for a dialogue': tables(ids={None: ['v_0']}),
    'a matrix of names': tables(ids={'v': np.zeros((2, 2))}),
    'names of bytes': tables(ids={'v': [b'v_0', b'v_1']}),
    'labels of texts': tables(labels={'v': ['1', '2']}),
    'labels of arrays': tables(labels={'v': [np.ones(2), np.ones(2)]}),
    'labels of objects': tables(labels={'v': np.array([None, 'x'], object)}),
    'labels beyond numbers': tables(labels={'v': [10**400, -(10**400)]}),
    'labels of infinity': tables(labels={'v': [float('inf'), float('nan')]}),
    'a label table of one number': tables(labels={'v': 1}),
    'parts of numbers': tables(train=[1, 2]),
    'parts that are texts': tables(train='v'),
    'names that steer a terminal': tables(ids={'v': ['v\n_0', '\x1b[2J']}),
    'a dialogue that steers a terminal': tables(ids={'\x1b[2J\n': ['v_0']}),
    'names from right to left': tables(ids={'v': ['\u202ev', 'w']}),
    'half a character': tables(ids={'v': ['\ud800', 'w']}),
}.items():
    pickled(name, data, 'labels', LABELS)

# --- releases: a data root that wants out, or never ends ---


def release(p, change=lambda data, text, secret: None, **tables_):
    "A sound release in p/data with one secret outside it; `change` breaks it."
    (text := p / 'data' / 'CMUMOSI' / 'features' / 'deberta-UTT').mkdir(parents=True)
    (audio := text.parent / 'wav2vec-UTT').mkdir()
    (secret := p.parent.parent / f'{p.name} secret').mkdir()
    t = (
        dict(
            ids={f'v{i}': [f'v{i}_0', f'v{i}_1'] for i in range(4)},
            labels={f'v{i}': [1.0, -1.0] for i in range(4)},
            speakers={},
            texts={},
            train={'v0', 'v1'},
            val={'v2'},
            test={'v3'},
        )
        | tables_
    )
    for u in [f'v{i}_{j}' for i in range(4) for j in range(2)]:
        np.save(text / f'{u}.npy', np.ones(3))
        np.save(audio / f'{u}.npy', np.ones(3))
    np.save(secret / 'v0_0.npy', np.full(3, 42.0))
    (p / 'data' / 'CMUMOSI' / LABELS).write_bytes(pickle.dumps([*t.values()], 4))
    change(p / 'data', text, secret)


def links(path, to):
    path.unlink() if path.is_file() else None
    path.symlink_to(to)


def faces(text):  # the modality in folders
    for f in list(text.iterdir()):
        (text / f.stem).mkdir()
        f.rename(text / f.stem / 'face.npy')


for name, change in {
    'a feature file that is a link': lambda d, t, s: links(t / 'v0_0.npy', s / 'v0_0.npy'),
    'a link by a relative path': lambda d, t, s: links(
        t / 'v0_0.npy', os.path.relpath(s / 'v0_0.npy', t)
    ),
    'a link to a link': lambda d, t, s: (
        links(t / 'other', s / 'v0_0.npy'),
        links(t / 'v0_0.npy', 'other'),
    ),
    'a link to a device': lambda d, t, s: links(t / 'v0_0.npy', '/dev/zero'),
    'a link to a file of the system': lambda d, t, s: links(t / 'v0_0.npy', '/etc/passwd'),
    'a link in a circle': lambda d, t, s: links(t / 'v0_0.npy', 'v0_0.npy'),
    'a link into the other folder of features': lambda d, t, s: links(
        t / 'v0_0.npy', '../wav2vec-UTT/v0_0.npy'
    ),
    'a label file that is a link': lambda d, t, s: (
        (s / 'l').write_bytes((d / 'CMUMOSI' / LABELS).read_bytes()),
        links(d / 'CMUMOSI' / LABELS, s / 'l'),
    ),
    'a label file that is a pipe': lambda d, t, s: (
        (d / 'CMUMOSI' / LABELS).unlink(),
        os.mkfifo(d / 'CMUMOSI' / LABELS),
    ),
    'a folder of frames that is a link': lambda d, t, s: (
        faces(t),
        (t / 'v0_0' / 'face.npy').unlink(),
        (t / 'v0_0').rmdir(),
        links(t / 'v0_0', s),
    ),
    'a frame that is a link': lambda d, t, s: (
        faces(t),
        links(t / 'v0_0' / 'face.npy', s / 'v0_0.npy'),
    ),
    'a feature file that is a pipe': lambda d, t, s: (
        (t / 'v0_0.npy').unlink(),
        os.mkfifo(t / 'v0_0.npy'),
    ),
    'a frame that is a pipe': lambda d, t, s: (
        faces(t),
        (t / 'v0_0' / 'face.npy').unlink(),
        os.mkfifo(t / 'v0_0' / 'face.npy'),
    ),
    'a feature file that is a socket': lambda d, t, s: (
        (t / 'v0_0.npy').unlink(),
        bound(t / 'v0_0.npy'),
    ),
    'a feature file that is a folder': lambda d, t, s: (
        (t / 'v0_0.npy').unlink(),
        (t / 'v0_0.npy').mkdir(),
    ),
    'a feature file of a terabyte': lambda d, t, s: sparse(t / 'v0_0.npy', 2**40, header((2**37,))),
    'a frame whose name steers a terminal': lambda d, t, s: (
        faces(t),
        (t / 'v0_0' / '\x1b[2J\nall is well.npy').write_bytes(b'x'),
    ),
    'a frame whose name is no text': lambda d, t, s: (
        faces(t),
        Path(os.fsdecode(os.fsencode(t / 'v0_0') + b'/\xff.npy')).write_bytes(b'x'),
    ),
    'folders whose names steer a terminal': lambda d, t, s: (
        t.rename(t.parent / 'bert\x1b[2J\nall is well'),
        (t.parent / 'wav2vec-UTT').rename(t.parent / 'wav2vec\n'),
    ),
    'features that are a file': lambda d, t, s: (
        t.parent.rename(d / 'away'),
        t.parent.write_bytes(b'x'),
    ),
    'two folders for a modality': lambda d, t, s: (t.parent / 'bert').mkdir(),
}.items():
    CASES[f'layout: {name}'] = 'layout', lambda p, change=change: release(p, change)
for name in (
    '../x secret/v0_0',
    '/etc/passwd',
    '..',
    '.',
    '',
    'v\0',
    'a/../../b',
    'a\\b',
    '~',
    '~root/x',
    '%2e%2e%2fx',
    '$HOME',
    '`touch harm`',
    '; touch harm',
    'v\nw',
    'CON',
    'x' * 5000,
    '\u202e',
    '\ud800',
    '*',
    '[a-z]*',
    '-rf',
    'v0_0.npy/../../x',
):
    CASES[f'layout: an utterance called {name!r:.30}'] = (
        'layout',
        lambda p, name=name: release(
            p,
            ids={'v0': [name], 'v1': ['v1_0'], 'v2': ['v2_0'], 'v3': ['v3_0']},
            labels={f'v{i}': [1.0] for i in range(4)},
        ),
    )
CASES['layout: many names and one wide file'] = (
    'layout',
    lambda p: release(
        p,
        lambda d, t, s: (
            [f.unlink() for f in t.iterdir() if f.stem != 'v0_0']
            and np.save(t / 'v0_0.npy', np.ones(2**16, np.float32))
        ),
        ids={'v0': ['v0_0', *(f'w{i}' for i in range(100_000))]},
        labels={'v0': [1.0] * 100_001},
        train={'v0'},
        val=set(),
        test=set(),
    ),
)


def bound(path):  # a socket; its name may not be long
    here = os.getcwd()
    os.chdir(path.parent)
    s = socket.socket(socket.AF_UNIX)
    s.bind(path.name)
    s.close()
    os.chdir(here)


# --- .npy files ---


def raw(text, version=(1, 0), length=None):  # a header as it is written by hand
    x = text.encode('latin1')
    return (
        b'\x93NUMPY'
        + bytes(version)
        + struct.pack('<H' if version == (1, 0) else '<I', len(x) if length is None else length)
        + x
    )


def header(shape, descr="'<f8'", fortran='False'):
    return raw(f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape!r}, }}\n")


for name, data in {
    'a header that calls': raw("__import__('os').system('touch harm')\n"),
    'a shape that calls': raw(
        "{'descr': '<f8', 'fortran_order': False, 'shape': (__import__('os').system('touch "
        "harm'),), }\n"
    ),
    'a type that calls': header((1,), "__import__('os')"),
    'objects': header((1,), "'|O'") + pickle.dumps(os.system),
    'objects that call': header((1,), "'O'") + b'cos\nsystem\n(S"touch harm"\ntR.',
    'a record': header((1,), "[('a', '<f8')]") + bytes(8),
    'a record of objects': header((1,), "[('a', 'O')]") + bytes(8),
    'a record whose name steers a terminal': header((1,), r"[('\x1b[2J\n', '<f8')]") + bytes(8),
    'a type of subarrays': header((1,), "('<f8', (1000000000,))") + bytes(8),
    'a type of 2 GB': header((1,), "'V2147483647'") + bytes(8),
    'a type of texts': header((1,), "'<U1000000000'") + bytes(8),
    'a time': header((1,), "'<M8[s]'") + bytes(8),
    'an unknown type': header((1,), "'<q17'"),
    'a type of numbers': header((1,), '5'),
    'a shape of a terabyte': header((10**12,)) + bytes(16),
    'a shape of huge numbers': raw(
        "{'descr': '<f8', 'fortran_order': False, 'shape': ("
        + '9' * 4000
        + ', '
        + '9' * 4000
        + '), }\n'
    ),
    'a shape below nothing': header((-1,)) + bytes(16),
    'a shape with a hole': header((10**9, 0, 10**9)),
    'a shape of many numbers': header((1,) * 2000) + bytes(8),
    'a shape that is a text': header('8'),
    'a shape of truths': header((True, True)) + bytes(3),
    'a width beyond all': header((2**20,), "'|u1'") + bytes(2**20),
    'a header of 64 KB': raw(' ' * 65_000 + '\n'),
    'a header of 4 GB': raw('{}', (2, 0), 2**32 - 1),
    'a header of 4 GB, version 3': raw('{}', (3, 0), 2**32 - 1),
    'a header of zeros': raw('\0' * 100),
    'a deep header': raw('(' * 9000),
    'a header of minus signs': raw('-' * 9000 + '1'),
    'a header of lists': raw('[' * 4000 + ']' * 4000),
    'a header of powers': raw('9**9**9**9'),
    'a header that is not over': raw("{'descr': '<f8'", length=500),
    'a header with more': raw(
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1,), 'more': 1}\n"
    )
    + bytes(8),
    'version 99': raw('{}', (99, 0)),
    'no magic': b'NUMPY' + bytes(99),
    'half a magic': b'\x93NUM',
    'nothing': b'',
    'one byte too few': header((2,)) + bytes(15),
    'NaN': header((1,)) + struct.pack('<d', float('nan')),
    'beyond float32': header((1,)) + struct.pack('<d', 1e300),
    'frames beyond float64': header((2, 1)) + struct.pack('<2d', 1.7e308, 1.7e308),
    'zip bomb': b'PK\x03\x04' + bytes(999),
    'a pickle': pickle.dumps(np.ones(3)),
}.items():
    pickled(name, data, 'npy', 'x.npy')

# --- what a run leaves behind: safetensors with a JSON header, result.json ---


# a safetensors file as it is written by hand: name -> (dtype, shape, bytes)
def tensors(meta, size=None, **named):
    at, about, body = 0, {} if meta is None else {'__metadata__': meta}, b''
    for name, (dtype, shape, data) in named.items():
        about[name] = dict(dtype=dtype, shape=shape, data_offsets=[at, at := at + len(data)])
        body += data
    x = json.dumps(about).encode()
    return struct.pack('<Q', len(x) if size is None else size) + x + body


DEEP = '[' * 100_000 + ']' * 100_000
BROKEN = {
    'nothing': b'',
    'eight bytes': struct.pack('<Q', 2),
    'a header of 2**63 bytes': struct.pack('<Q', 2**63) + b'{}',
    'a header of 100 MB': struct.pack('<Q', 10**8) + b'{}',
    'no JSON': struct.pack('<Q', 4) + b'{{{{',
    'a header that is a list': struct.pack('<Q', 2) + b'[]',
    'no metadata': tensors(None, x=('F32', [1], bytes(4))),
    'metadata of others': tensors({'format': 'pt'}),
    'offsets outside': tensors({}, x=('F32', [1], bytes(4)))[:-4],
    'a shape of a terabyte': tensors({}, x=('F32', [2**40], bytes(4))),
    'a shape that overflows': tensors({}, x=('F32', [2**40, 2**40], bytes(4))),
    'a dtype of nobody': tensors({}, x=('Q99', [1], bytes(4))),
    'a pickle': pickle.dumps([1]),
    'a zip file': b'PK\x03\x04' + bytes(99),
}
D = dict(
    format=3,
    note='',
    task=dict(name='t', classes=['x', 'y'], low=-3.0, high=3.0, simulated=True, views={}),
    modalities=['a'],
    ids=['d'],
    utterances=['u'],
    part=['train'],
    encoded=False,
)
T = {
    'features/a': ('F32', [1, 1], bytes(4)),
    'present': ('BOOL', [1, 1], b'\1'),
    'speaker': ('I64', [1], bytes(8)),
    'label': ('I64', [1], bytes(8)),
    'offset': ('I64', [2], struct.pack('<2q', 0, 1)),
}


# with the checksum that belongs to it: whoever makes a bad file can do that, too
def sealed(about, **named):
    h = hashlib.sha256(about.encode())
    for k, (dtype, shape, data) in sorted(named.items()):
        h.update(
            (
                f'{k} '
                f'torch.{dict(F32="float32", F64="float64", I64="int64", BOOL="bool")[dtype]} '
                f'{tuple(shape)}'
            ).encode()
            + data
        )
    return tensors(dict(about=about, sha256=h.hexdigest()), **named)


def dialogues(meta=None, **named):
    return sealed(json.dumps({**D, **(meta or {})}), **{**T, **named})


for name, data in {
    **BROKEN,
    'sound': dialogues(),
    'another checksum': dialogues().replace(b'd', b'e', 1),
    'deep JSON': sealed(DEEP, **T),
    'JSON that is a list': sealed('[]', **T),
    'JSON that is NaN': sealed('NaN', **T),
    'modalities of numbers': dialogues(dict(modalities=[1])),
    'modalities that are a text': dialogues(dict(modalities='b')),
    'a task of nothing': dialogues(dict(task=None)),
    'classes of numbers': dialogues(dict(task=dict(D['task'], classes=5))),
    'ids that are a number': dialogues(dict(ids=5)),
    'ids of numbers': dialogues(dict(ids=[5])),
    'utterances of lists': dialogues(dict(utterances=[[]])),
    'one name too many': dialogues(dict(utterances=['u', 'v'])),
    'parts of None': dialogues(dict(part=[None])),
    'encoded that is a text': dialogues(dict(encoded='no')),
    'a label of no dimension': dialogues(label=('I64', [], bytes(8))),
    'a label of truths': dialogues(label=('BOOL', [1], b'\1')),
    'a matrix of labels': dialogues(label=('I64', [1, 1], bytes(8))),
    'present of numbers': dialogues(present=('F32', [1, 1], bytes(4))),
    'present of no dimension': dialogues(present=('BOOL', [], b'\1')),
    'too many modalities present': dialogues(present=('BOOL', [1, 2], b'\1\1')),
    'offsets of fractions': dialogues(offset=('F32', [2], bytes(8))),
    'offsets that go back': dialogues(offset=('I64', [2], struct.pack('<2q', 0, -5))),
    'offsets that go too far': dialogues(offset=('I64', [2], struct.pack('<2q', 0, 2**40))),
    'features of numbers of 8 bytes': dialogues(**{'features/a': ('F64', [1, 1], bytes(8))}),
    'features of one dimension': dialogues(**{'features/a': ('F32', [1], bytes(4))}),
    'speakers of fractions': dialogues(speaker=('F32', [1], bytes(4))),
}.items():
    pickled(name, data, 'dialogues', 'x.safetensors')
for name, data in {
    **BROKEN,
    'a mask of numbers': tensors(
        dict(mask='x', utterances='y', about='{}'), keep=('F32', [1], bytes(4))
    ),
    'a mask of no dimension': tensors(
        dict(mask='x', utterances='y', about='{}'), keep=('BOOL', [], b'\1')
    ),
    'a mask without its hash': tensors({'utterances': 'y'}, keep=('BOOL', [1, 1], b'\1')),
}.items():
    pickled(name, data, 'mask', 'x.safetensors')
for name, data in {
    **BROKEN,
    'sound': tensors(
        {'names': '[["u"], ["a"]]'},
        output=('F32', [1, 1, 2], bytes(8)),
        label=('I64', [1], bytes(8)),
    ),
    'names that are deep': tensors({'names': DEEP}),
    'names of one list': tensors({'names': '[[]]'}),
    'names of numbers': tensors({'names': '5'}),
    'no tensors': tensors({'names': '[[], []]'}),
}.items():
    pickled(name, data, 'observed', 'x.safetensors')

M = dict(
    method='majority',
    options={},
    widths={'a': 3},
    task=dict(name='t', classes=['x', 'y'], low=-3.0, high=3.0, simulated=True, views={}),
)
Q = {'model.q': ('F32', [1], struct.pack('<f', 1)), 'model.prior': ('F32', [2], bytes(8))}


def model(meta=None, **named):
    return tensors({'mculora': json.dumps({**M, **(meta or {})})}, **{**Q, **named})


BIG = dict(method='mculora', options=dict(width=64, depth=1))
for name, data in {
    **BROKEN,
    'sound': model(),
    'deep JSON': tensors({'mculora': DEEP}, **Q),
    'JSON that is a list': tensors({'mculora': '[]'}, **Q),
    'a method of nobody': model(dict(method='evil')),
    'a method that is a path': model(dict(method='../../evil')),
    'a method that is a module': model(dict(method='os.system')),
    'a method that is a list': model(dict(method=[])),
    'an option of nobody': model(dict(options=dict(evil=1))),
    'options that are a list': model(dict(options=[])),
    'an option of the wrong type': model(dict(BIG, options=dict(width='64'))),
    'no widths': model(dict(widths={})),
    'widths that are a list': model(dict(widths=['a'])),
    'a width below nothing': model(dict(widths={'a': -3})),
    'a width of a fraction': model(dict(widths={'a': 1.5})),
    'a width of a terabyte': model(dict(BIG, widths={'a': 10**12})),
    'a model of a terabyte': model(dict(BIG, options=dict(width=10**6, depth=1))),
    'a model of a million layers': model(dict(BIG, options=dict(width=64, depth=10**6))),
    'sixty modalities': model(dict(widths={f'm{i}': 1 for i in range(60)})),
    'a modality called __class__': model(dict(BIG, widths={'__class__': 3, 'a.b': 3})),
    'a task of nothing': model(dict(task=None)),
    'a task without a name': model(dict(task=dict(classes=[]))),
    'classes of a number': model(dict(task=dict(M['task'], classes=5))),
    'a weight too few': tensors({'mculora': json.dumps(M)}, **{'model.q': Q['model.q']}),
    'a weight too many': model(**{'model.more': ('F32', [1], bytes(4))}),
    'a weight of another shape': model(**{'model.prior': ('F32', [3], bytes(12))}),
    'weights of NaN': model(**{'model.prior': ('F32', [2], struct.pack('<2f', float('nan'), 0))}),
    'half a scale': model(**{'scale.a.mean': ('F64', [3], bytes(24))}),
    'a scale of another width': model(
        **{'scale.a.mean': ('F64', [2], bytes(16)), 'scale.a.std': ('F64', [2], bytes(16))}
    ),
}.items():
    pickled(name, data, 'model', 'model.safetensors')
R = dict(
    format=1,
    status='complete',
    config={},
    config_hash='x',
    data={},
    scores=[],
    stages=[],
    files={},
    environment={},
    seconds=1.0,
    peak_mb=1.0,
)
for name, data in {
    'sound': json.dumps(R),
    'nothing': '',
    'no JSON': '{',
    'a list': '[]',
    'deep': DEEP,
    'a deep field': json.dumps(R)[:-1] + f', "masks": {DEEP}}}',
    'no text': b'\xff\xfe',
    'a field too few': json.dumps({k: v for k, v in R.items() if k != 'scores'}),
    'a field too many': json.dumps({**R, 'evil': 1}),
    'scores of numbers': json.dumps({**R, 'scores': [1]}),
    'scores of texts': json.dumps(
        {**R, 'scores': [dict(selection='x', condition='a', metric='WA', value='high')]}
    ),
    'seconds that are a text': json.dumps({**R, 'seconds': 'long'}),
    'a config that is a list': json.dumps({**R, 'config': []}),
    'a number of a million digits': json.dumps(R).replace('1.0', '9' * 10**6),
    'files of numbers': json.dumps({**R, 'files': {'x': 5}}),
    'zeros': bytes(9999),
}.items():
    pickled(name, data if isinstance(data, bytes) else data.encode(), 'result', 'result.json')

# --- what came of it ---

pickled('os.system', b'cos\nsystem\n(S"touch harm"\ntR.', 'control')
pickled('open', b'', 'control open')
pickled('kill', b'', 'control death')


def read_all(top, wanted):
    """These cases, read by the watched process: name -> what happened. Nothing is made outside
    `top`."""
    folders, names = top / 'cases', {}
    (top / 'first' / 'sound').mkdir(parents=True)
    release(top / 'first' / 'sound')
    for i, name in enumerate(wanted):
        kind, fill = CASES[name]
        case = folders / ('control' if kind == 'control' else f'{i:04}')
        case.mkdir(parents=True)
        names[case.name] = name
        fill(case)
        (case / 'kind').write_text(kind)
    done = subprocess.run(
        [sys.executable, __file__, str(folders)],
        cwd=top,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = {
        names[n]: dict(
            r,
            harm=(folders / n / 'harm').exists(),
            size=sum(f.lstat().st_blocks * 512 for f in (folders / n).rglob('*')),
        )
        for n, r in map(json.loads, done.stdout.splitlines())
    }
    assert said.keys() == set(wanted)
    return said


def once(tmp_path_factory, name, wanted):
    """The same, by one of the processes that test side by side: the first to ask works in a folder
    of its own, the others wait."""
    top = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        top = top.parent
    with open(top / f'{name}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (file := top / f'{name}.json').exists():
            said = json.dumps(read_all(tmp_path_factory.mktemp(name), wanted))
            file.write_text(said)
        return json.loads(file.read_text())


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
    return once(tmp_path_factory, 'hostile', [n for n in CASES if n not in EVERY_WAY])


@pytest.fixture(scope='module')
def seen_every_way(tmp_path_factory):
    return once(tmp_path_factory, 'hostile-every-way', sorted(EVERY_WAY))


def test_the_watch_sees_code_and_eyes(seen):
    "The same file, read without care, is seen, and so is a death: what follows can fail."
    assert seen['control death: kill']['outcome'] == 'dies of 9'
    loose, outside = seen['control: os.system'], seen['control open: open']
    assert (
        loose['harm']
        and any('os.system' in e for e in loose['events'])
        and any(e.startswith('open') for e in outside['events'])
    )


def judge(r, campaign, name):
    # else a reader that refuses everything would do
    sound = name.endswith(': sound')
    campaign['bad inputs tried'] += not sound
    campaign['code executed'] += bool(r['events'] or r['harm'])
    assert not r['events'] and not r['harm']
    if name in HARMLESS or sound:
        assert r['outcome'] == 'value', r
    else:
        assert r['outcome'] == 'DataError', r
        # `read_features` puts the name before what `read_npy` says
        assert any(
            file in r['message']
            for file in (
                'x.pkl',
                'x.safetensors',
                'result.json',
                'model.safetensors',
                LABELS,
                'deberta',
                'wav2vec',
                'features',
                'dialogue v',
            )
        ) or r['kind'] in ('npy', 'labels'), r['message']
        assert r['message'].isprintable() and len(r['message']) < 3000, r['message']
    assert r['seconds'] < 10 and r['mb'] < 128 + 100 * r['size'] / 2**20, r


@pytest.mark.parametrize(
    'name', [n for n, (kind, _) in CASES.items() if 'control' not in kind and n not in EVERY_WAY]
)
def test_a_bad_file_is_refused_by_name(seen, campaign, name):
    judge(seen[name], campaign, name)


@pytest.mark.faults
@pytest.mark.parametrize('gadget', GADGETS)
def test_a_call_is_refused_in_every_way_that_a_pickle_has(seen_every_way, campaign, gadget):
    for name in sorted(EVERY_WAY):
        if name.startswith(f'pickle: {gadget} by '):
            judge(seen_every_way[name], campaign, name)


@pytest.mark.parametrize('method', sorted(methods()))
def test_a_sound_model_file_of_every_method_is_read(tmp_path, method):
    task, options = Task('t', ('x', 'y')), known(method, dict(width=16, depth=1, rank=2))
    m = create(method, task, {'a': 3, 't': 4}, options)
    save_method(
        m,
        {'a': (torch.zeros(3, dtype=torch.double), torch.ones(3, dtype=torch.double))},
        tmp_path / 'model.safetensors',
    )
    back, stats = load_method(tmp_path)
    assert (
        back.task == task
        and back.settings == m.settings
        and list(stats) == ['a']
        and all(torch.equal(x, back.state_dict()[k]) for k, x in m.state_dict().items())
    )


def test_options_from_the_command_line_are_refused_in_words(campaign):
    for options in (
        '[]',
        '{"evil": 1}',
        '{"width": "64"}',
        '{"width": NaN}',
        '{',
        '5',
        'null',
        DEEP,
        '{"width": 1e999}',
        '{"bounds": [[]]}',
    ):
        campaign['bad inputs tried'] += 1
        said = CliRunner().invoke(
            app, ['train', '--size', 'tiny', '--fold', '1', '--options', options]
        )
        assert (
            said.exit_code == 2 and 'Error: ' in said.output and 'Traceback' not in said.output
        ), (options[:20], said.output)


# --- the package itself ---

LOADERS = {
    f'{m}.{f}'
    for m, fs in dict(
        pickle='load loads Unpickler',
        _pickle='load loads Unpickler',
        cPickle='load loads',
        torch='load',
        joblib='load',
        dill='load loads',
        cloudpickle='load loads',
        marshal='load loads',
        shelve='open',
        pandas='read_pickle read_hdf eval',
        pd='read_pickle read_hdf eval',
        yaml='load unsafe_load full_load',
        os='system popen',
        runpy='run_path run_module',
        importlib='reload',
        **{
            'torch.hub': 'load',
            'torch.jit': 'load',
            'torch.package': 'PackageImporter',
            'numpy.lib.format': 'read_array',
            'np.lib.format': 'read_array',
        },
    ).items()
    for f in fs.split()
}


def unsafe(tree):
    "What in a program would run what a file says."
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS:
            yield ast.unparse(node)
        if isinstance(node, ast.ImportFrom):
            yield from ({f'{node.module}.{a.name}' for a in node.names} & LOADERS)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (
                {
                    n.split('.')[0]
                    for n in (
                        [a.name for a in node.names]
                        if isinstance(node, ast.Import)
                        else [node.module or '']
                    )
                }
                & {'joblib', 'dill', 'cloudpickle', 'marshal', 'shelve', '_pickle'}
            )
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in (
            'eval',
            'exec',
            'compile',
            '__import__',
        ):
            yield node.func.id
        yield from (
            ast.unparse(k)
            for k in node.keywords
            if k.arg in ('allow_pickle', 'shell', 'weights_only')
            and not (
                isinstance(k.value, ast.Constant) and k.value.value is (k.arg == 'weights_only')
            )
        )


def test_nothing_in_the_package_runs_what_a_file_says():
    own = {
        p.relative_to(ROOT).as_posix(): list(unsafe(ast.parse(p.read_text())))
        for p in (ROOT / 'mculora').rglob('*.py')
    }
    assert {name: found for name, found in own.items() if found} == {}
    bases = [
        ast.unparse(b)
        for p in (ROOT / 'mculora').rglob('*.py')
        for n in ast.walk(ast.parse(p.read_text()))
        if isinstance(n, ast.ClassDef)
        for b in n.bases
    ]
    # the restricted one
    assert [b for b in bases if 'Unpickler' in b] == ['pickle._Unpickler']


@pytest.mark.parametrize(
    'line',
    [
        'pickle.load(f)',
        'from pickle import loads',
        'torch.load(f)',
        'torch.load(f, weights_only=False)',
        'np.load(f, allow_pickle=True)',
        'np.load(f, allow_pickle=x)',
        'import joblib',
        'pd.read_pickle(f)',
        'eval(x)',
        'subprocess.run(x, shell=True)',
        'os.system(x)',
        'from torch import load',
        'f = pickle.Unpickler',
    ],
)
def test_what_runs_what_a_file_says_is_seen(line):
    assert list(unsafe(ast.parse(line)))
