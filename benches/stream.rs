//! `make bench-stream`: what one connection between two agents carries from memory to memory, and how
//! much of that the memory of a container gets.
//!
//! Between two hosts of the lab, all from memory:
//! - *dropped*: TLS 1.3 and HTTP, nothing else, and nobody keeps what arrives.
//! - *connection*: the same to where memory goes, a file in memory.
//! - *bundle*: the same in the form that images have on the wire: frames, a checksum, counted and checked.
//! - *migration*: the direct engine moves a container with that much memory; what went while it was
//!   frozen, by the time in which CRIU handed it out.
//!
//! In turns, so that whatever else the machine does hits all of them.
//!
//! | variable | default | |
//! | --- | --- | --- |
//! | `LIVEMIG_BENCH_RUNS` | 5 | of each |
//! | `LIVEMIG_BENCH_MIB` | 2048 | the container's memory, and half of it for each stream |
//!
//! The result is in `target/bench/stream.json`.

#[path = "../tests/lab/mod.rs"]
mod lab;
mod record;

use std::convert::Infallible;
use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::{self, BoxFuture};
use futures::stream::{self, BoxStream};
use futures::{FutureExt, Stream, StreamExt, TryStreamExt};
use hyper::{HeaderMap, Method, Request};
use lab::pair::{Pair, report};
use lab::{Lab, Node};
use livemig::Config;
use livemig::agent::{
    Address, Body, Caller, Connection, Handler, Limits, Peer, Reply, Server, Trust, reply,
};
use livemig::bundle;
use livemig::netlink::Namespace;
use record::{Figures, number};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

/// What the stream of a container's memory is asked to reach of what the connection carries.
const ASKED: f64 = 0.8;
/// Pieces as large as those that the relay of memory pages makes.
const PIECE: usize = 1 << 20;
/// Nothing takes this long.
const BOUND: Duration = Duration::from_secs(300);

/// What is put on the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Dropped,
    Connection,
    Bundle,
}

impl Form {
    const ALL: [Form; 3] = [Form::Dropped, Form::Connection, Form::Bundle];

    fn name(self) -> &'static str {
        match self {
            Form::Dropped => "dropped",
            Form::Connection => "connection",
            Form::Bundle => "bundle",
        }
    }

    fn path(self) -> String {
        format!("/{}", self.name())
    }

    /// What crosses, of so many bytes of content.
    fn stream(self, length: u64) -> BoxStream<'static, bundle::Result<Bytes>> {
        let pieces = content(length);
        match self {
            Form::Dropped | Form::Connection => {
                pieces.map(|piece| Ok(piece.unwrap_or_default())).boxed()
            }
            Form::Bundle => bundle::send(pieces).0.boxed(),
        }
    }
}

/// Memory that nothing can compress, over and over.
fn content(length: u64) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
    let mut state = 1u64;
    let piece: Bytes = (0..PIECE)
        .map(|_| {
            // Knuth's linear congruential generator; its high bits are good enough for this.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .collect();
    let pieces = length.div_ceil(PIECE as u64);
    stream::iter((0..pieces).map(move |_| Ok(piece.clone())))
}

/// Takes what comes, and answers with how much it was.
struct Sink;

impl Handler for Sink {
    fn handle(
        self: Arc<Self>,
        _caller: Caller,
        request: Request<Body>,
    ) -> BoxFuture<'static, Reply> {
        async move {
            let form = Form::ALL
                .into_iter()
                .find(|form| form.path() == request.uri().path())
                .expect("one of ours");
            let body = request.into_body();
            let content = if form == Form::Bundle {
                let (content, _) = bundle::receive(body, u64::MAX);
                content.map_err(|error| error.to_string()).boxed()
            } else {
                body.map_err(|error| error.to_string()).boxed()
            };
            let mut kept = (form != Form::Dropped).then(|| {
                let memory = Config::default().memory_dir;
                tempfile::tempfile_in(memory).expect("a file in memory")
            });
            let keep = |length: u64, piece: Bytes| {
                let written = kept.as_mut().map_or(Ok(()), |file| file.write_all(&piece));
                let length = length + piece.len() as u64;
                future::ready(written.map(|()| length).map_err(|error| error.to_string()))
            };
            let length: Result<u64, String> = content.try_fold(0, keep).await;
            reply::json(&length)
        }
        .boxed()
    }
}

/// Runs something in the network of a host, on a runtime of its own: so do agents.
fn at<T: Send>(host: &Node, work: impl AsyncFnOnce() -> T + Send) -> T {
    let namespace = Namespace::path(&host.network_namespace()).expect("it is there");
    let run = || Runtime::new().expect("a runtime").block_on(work());
    namespace.run(run).expect("entered")
}

/// A host's key, and the hosts that it knows.
fn trust(state: &tempfile::TempDir, name: &str) -> Trust {
    let name = name.parse().expect("a name");
    Trust::open(state.path(), name, &Limits::default()).expect("a state directory")
}

/// Megabytes per second of each form, one after the other.
fn rates(source: &Node, destination: &Node, length: u64) -> [f64; Form::ALL.len()] {
    let states = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
    let [own, theirs] = [trust(&states[0], "h1"), trust(&states[1], "h2")];
    let peer = Peer::new(own.name.clone(), None, own.identity.fingerprint());
    theirs.peers.add(&peer).expect("a peer");
    let expected = theirs.identity.fingerprint();
    let (ready, listening) = mpsc::channel();
    let (enough, stop) = tokio::sync::oneshot::channel::<()>();
    let any = SocketAddr::new(destination.address(), 0);
    thread::scope(|scope| {
        scope.spawn(move || {
            at(destination, async || {
                let server = Server::bind(any, theirs, Limits::default()).await;
                let server = server.expect("it listens");
                let address = server.local_addr().expect("it has one");
                ready.send(address).expect("somebody waits");
                let stop = async { drop(stop.await) };
                server.serve(Arc::new(Sink), stop).await;
            });
        });
        let address: Address = listening.recv().expect("it listens").into();
        let rates = at(source, async || {
            let limits = Limits::default();
            let opened = Connection::open(&address, expected, &own.identity, &limits).await;
            let mut connection = opened.expect("it connects");
            let mut rates = [0.0; Form::ALL.len()];
            for (form, rate) in Form::ALL.into_iter().zip(&mut rates) {
                let (path, stream) = (form.path(), form.stream(length));
                let begin = Instant::now();
                let sent = connection
                    .send_stream(Method::PUT, &path, HeaderMap::new(), stream, BOUND)
                    .await;
                let took = begin.elapsed();
                let arrived: Result<u64, String> = sent.expect("an answer");
                assert_eq!(arrived, Ok(length), "all of it arrived");
                *rate = length as f64 / 1e6 / took.as_secs_f64();
            }
            rates
        });
        // Nobody else hears it.
        let _ = enough.send(());
        rates
    })
}

/// Megabytes per second in which the memory of a frozen container crossed, and what its report says.
async fn migration(pair: &Pair, mib: u64) -> (f64, Value) {
    const PORT: &str = "7000";
    let memory = mib.to_string();
    let touch = ["touch", &memory, "0", PORT];
    let publish = format!("{PORT}:{PORT}");
    let source = pair.host(1);
    source.run_workload("web", &["-p", &publish], &touch).await;
    // It listens when all of it is there.
    let port = PORT.parse().expect("a port");
    let asked = pair.client(1).ask(source.address(), port, "info");
    asked.await;
    let output = pair.try_migrate("web", 1, 2, &["--engine", "direct"]).await;
    assert!(output.status.success(), "{output}");
    let report = report(&output);
    let look = ["/workload", "ask", "127.0.0.1", PORT, "memory"];
    let look = [&["podman", "exec", "web"][..], &look].concat();
    let memory = pair.host(2).exec(&look).await.json();
    assert_eq!(memory["pages"], mib * 256, "{memory}");
    assert_eq!(memory["wrong"], 0, "{memory}");
    pair.host(2)
        .exec(&["podman", "rm", "-f", "-t", "0", "web"])
        .await;
    // CRIU's own time for handing the pages out: it waits whenever the connection is not ready for more.
    let writing = &report["dump"]["memory_write"];
    let writing = number(&writing["secs"]) + number(&writing["nanos"]) / 1e9;
    let rate = number(&report["bytes_frozen"]) / 1e6 / writing;
    (rate, report)
}

fn main() -> ExitCode {
    if !record::wanted() {
        return ExitCode::SUCCESS;
    }
    let runs: usize = record::setting("LIVEMIG_BENCH_RUNS", 5);
    let mib: u64 = record::setting("LIVEMIG_BENCH_MIB", 2048);
    let runtime = Runtime::new().expect("a runtime");
    let pair = runtime.block_on(Pair::direct(Lab::builder(2)));
    let mut carried = Form::ALL.map(|form| (form, Vec::new()));
    let mut moves = Vec::new();
    for _ in 0..runs {
        let rates = rates(pair.host(1), pair.host(2), mib << 19);
        for ((_, all), rate) in carried.iter_mut().zip(rates) {
            all.push(rate);
        }
        moves.push(runtime.block_on(migration(&pair, mib)));
    }
    runtime.block_on(pair.down());

    println!("\n{:<12} {:>2}  MB/s: median [min max]", "stream", "n");
    let mut result = json!({ "mib": mib });
    let mut show = |name: &str, rates: Vec<f64>| {
        let count = rates.len();
        let figures = Figures::from(rates);
        println!("{name:<12} {count:>2}  {figures}");
        result[name] = figures.json();
        figures.median
    };
    let carried = carried.map(|(form, rates)| show(form.name(), rates));
    let moved = show("migration", moves.iter().map(|(rate, _)| *rate).collect());
    let [of_dropped, share, of_bundle] = carried.map(|carried| moved / carried);
    result["share"] = json!(share);
    result["share_of_dropped"] = json!(of_dropped);
    result["share_of_bundle"] = json!(of_bundle);
    result["reports"] = moves.into_iter().map(|(_, report)| report).collect();
    record::write_json("stream.json", &result);
    let good = share >= ASKED;
    println!(
        "{}: the memory of a container of {mib} MiB crosses at {share:.2} of what the connection carries from \
         memory to memory ({ASKED} or more is asked for), at {of_bundle:.2} of what it carries in the form of \
         a bundle, and at {of_dropped:.2} of what it carries for nobody to keep",
        if good { "PASS" } else { "FAIL" }
    );
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
