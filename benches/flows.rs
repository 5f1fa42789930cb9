//! `make bench-flows`: what many connections of one container cost.
//!
//! First the three things that are done to each of them while the container stands still, in network
//! namespaces of their own and through the library's own calls: reading them at the source
//! (*dump*), inserting them at the destination (*insert*), and pointing them at the hop (*mark*).
//! They are TCP connections through a published port: translated at the source, untranslated at the
//! destination. What is timed is what a migration does, the conversions included.
//!
//! Then a whole migration, in the lab: a container with real UDP flows through a published port, few
//! and many in turns. What differs is what the flows cost on top of everything else: also their way
//! over the wire. Each flow has to be answered before, and after.
//!
//! `LIVEMIG_BENCH_RUNS` (9, of the first; a third of it of the second).

#[path = "../tests/lab/mod.rs"]
mod lab;
#[path = "../tests/netns/mod.rs"]
mod netns;
mod record;

use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use lab::pair::{self, Pair};
use livemig::conntrack::{
    Entry, Flow, Mark, Protocol, Status, Table, TcpInfo, TcpSide, TcpState, Tuple,
};
use livemig::tunnel::HopId;
use netns::{Net, within};
use record::{Figures, number};
use serde_json::{Value, json};

const COUNTS: [usize; 3] = [100, 1_000, 10_000];
/// What 10,000 may cost in all, in milliseconds.
const MOST: f64 = 100.0;
const STEPS: [&str; 3] = ["dump", "insert", "mark"];

fn main() -> ExitCode {
    if !record::wanted() {
        return ExitCode::SUCCESS;
    }
    let runs: usize = record::setting("LIVEMIG_BENCH_RUNS", 9).max(1);
    println!(
        "{:>7} {:<24} {:<24} {:<24} {:>8}",
        "flows", "dump/ms: median", "insert/ms", "mark/ms", "sum/ms"
    );
    let mut rows: Vec<Value> = COUNTS.iter().map(|count| tables(*count, runs)).collect();
    let many = rows.last().map_or(f64::NAN, |row| number(&row["sum_ms"]));

    println!("\na whole migration, with UDP flows:");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let answered = runtime.block_on(migrations(&mut rows, runs.div_ceil(3)));
    println!();
    record::write_json("flows.json", &json!(rows));
    let good = many < MOST;
    println!(
        "{}: 10,000 flows take {many:.1} ms ({MOST} is the most)",
        if good { "PASS" } else { "FAIL" }
    );
    if !answered {
        println!("FAIL: not every flow went on");
    }
    if good && answered {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

// ------------------------------------------------------------------------------------------------
// The tables
// ------------------------------------------------------------------------------------------------

fn container() -> IpAddr {
    [10, 88, 0, 5].into()
}

/// A connection from a peer to a published port, as its host knows it.
fn published(number: usize) -> Entry {
    // Some peers with many connections each, as behind proxies.
    const OF_EACH: usize = 1000;
    let peer = IpAddr::from([
        203,
        0,
        113,
        u8::try_from(number / OF_EACH).expect("few peers"),
    ]);
    let port = u16::try_from(20_000 + number % OF_EACH).expect("few of each peer");
    let tcp = |source: IpAddr, from: u16, destination: IpAddr, to: u16| Tuple {
        source,
        destination,
        protocol: Protocol::Tcp {
            source: from,
            destination: to,
        },
    };
    let side = TcpSide {
        window_scale: 7,
        flags: 0x03,
    };
    Entry {
        original: tcp(peer, port, [192, 0, 2, 1].into(), 8080),
        reply: tcp(container(), 80, peer, port),
        status: Status::PORTABLE,
        timeout: Duration::from_secs(432_000),
        mark: Mark::NONE,
        tcp: Some(TcpInfo {
            state: TcpState::Established,
            original: side,
            reply: side,
        }),
        sctp: None,
        counters: None,
        zone: 0,
        id: None,
    }
}

/// So many connections, each step measured so many times.
fn tables(count: usize, runs: usize) -> Value {
    let net = Net::new();
    let source = Table::open(&net.host).expect("the source's table");
    let destination = Table::open(&net.other).expect("the destination's table");
    let (there, back) = (hop(3), hop(1));
    let mut took: [Vec<f64>; 3] = Default::default();
    within(&net.host, async || {
        let entries = (0..count).map(published).collect();
        all(source.insert_all(entries).await);
        for _ in 0..runs {
            let mut clock = Instant::now();
            let mut lap = |step: usize| {
                took[step].push(clock.elapsed().as_secs_f64() * 1e3);
                clock = Instant::now();
            };
            let entries = source.dump_container(container()).await.expect("a dump");
            let flows: Vec<Flow> = entries
                .iter()
                .filter_map(|entry| entry.flow_of(container()))
                .collect();
            lap(0);
            let copies = flows.iter().map(|flow| flow.at_destination(back));
            let inserted = destination.insert_all(copies.collect()).await;
            lap(1);
            let marks = |to: Option<HopId>| {
                let marks = flows.iter().map(|flow| {
                    let (mark, mask) = flow.steering(to);
                    (flow.entry.original, mark, mask)
                });
                marks.collect::<Vec<_>>()
            };
            let marked = source.set_mark_all(marks(Some(there))).await;
            lap(2);

            all(marked);
            assert_eq!(flows.len(), count, "the dump has them all");
            all(inserted);
            let marked = source.dump_container(container()).await.expect("a dump");
            let pointed = |entry: &Entry| entry.mark.bits() >> 24 == u32::from(there.get());
            assert_eq!(marked.iter().filter(|entry| pointed(entry)).count(), count);
            // For the next time.
            all(source.set_mark_all(marks(None)).await);
            let seen = flows.iter().map(|flow| flow.seen).collect();
            all(destination.delete_all(seen).await);
        }
    });
    let figures = took.map(Figures::from);
    let sum: f64 = figures.iter().map(|figure| figure.median).sum();
    let text =
        figures.map(|figure| format!("{:.2} [{:.2} {:.2}]", figure.median, figure.min, figure.max));
    println!(
        "{count:>7} {:<24} {:<24} {:<24} {sum:>8.2}",
        text[0], text[1], text[2]
    );
    let mut row = json!({ "flows": count, "sum_ms": sum });
    for (step, figure) in STEPS.iter().zip(figures) {
        row[format!("{step}_ms")] = json!(figure.median);
        row[*step] = figure.json();
    }
    row
}

fn hop(number: u8) -> HopId {
    HopId::try_from(number).expect("a hop's number")
}

/// Panics unless all of many things were done.
fn all<T>(outcomes: livemig::conntrack::Result<Vec<livemig::conntrack::Result<T>>>) {
    for outcome in outcomes.expect("the kernel answers") {
        outcome.expect("it does what it is asked");
    }
}

// ------------------------------------------------------------------------------------------------
// Migrations
// ------------------------------------------------------------------------------------------------

/// Few flows and many, in turns; adds what they took to the rows. Says whether all went on.
async fn migrations(rows: &mut [Value], runs: usize) -> bool {
    let counts = [COUNTS[0], COUNTS[2]];
    let mut seen: [Vec<Value>; 2] = Default::default();
    for _ in 0..runs {
        for (count, seen) in counts.iter().zip(&mut seen) {
            seen.push(migrate(*count).await);
        }
    }
    let mut answered = true;
    for (count, seen) in counts.iter().zip(&seen) {
        let downtime = Figures::of(seen, "downtime_ms");
        let total = Figures::of(seen, "total_ms");
        let good = seen.iter().all(|run| run["answered"] == true);
        answered &= good;
        println!(
            "{count:>7} downtime/ms {downtime:<24} total/ms {total:<24}{}",
            if good { "" } else { "  not all went on" }
        );
        if let Some(row) = rows.iter_mut().find(|row| row["flows"] == *count) {
            row["migration"] = json!({
                "downtime_ms": downtime.json(), "total_ms": total.json(), "runs": seen,
            });
        }
    }
    answered
}

async fn migrate(count: usize) -> Value {
    let pair = Pair::up().await;
    let (h1, c1) = (pair.host(1), pair.client(1));
    h1.run_workload("web", &["-p", "7000:7000/udp"], &["udp-echo", "7000"])
        .await;
    let flows = count.to_string();
    let client = c1
        .spawn(&["client-udp-flows", &h1.ip(), "7000", "--flows", &flows])
        .await;
    let begin = Instant::now();
    let moved = pair.try_migrate("web", 1, 2, &[]).await;
    let total = begin.elapsed().as_secs_f64() * 1e3;
    let client = client.stop().await;
    let mut run = json!({ "total_ms": total, "answered": false, "client": client });
    if moved.status.success() {
        let report = pair::report(&moved);
        let kept = report["flows"].as_array().map(Vec::len);
        run["kept"] = json!(kept);
        run["answered"] = json!(
            kept == Some(count)
                && client["answered_before"] == count
                && client["answered_after"] == count
        );
        run["downtime_ms"] = report["downtime_ms"].clone();
        run["phases"] = report["phases"].clone();
    } else {
        eprintln!("the container did not move:\n{}", moved.stderr);
    }
    pair.down().await;
    run
}
