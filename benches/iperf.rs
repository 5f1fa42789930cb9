//! `make bench-iperf`: a real iperf3 in a container that moves twice while its client goes on.
//!
//! Three hosts; the server is in a container that begins on h1, the client is outside, on c1. TCP in
//! both directions at once (`--bidir`), then datagrams of 16 bytes (`-u -l 16`), each for some 30 s with
//! the migrations h1→h2 and h2→h3 on the way: a fifth of the time before the first, a good quarter
//! after each. Both are done twice: with the path shortened after the
//! second migration, as it is by default, and with `--keep-chain`, where every packet goes through h2.
//!
//! *TCP* is what the client has sent and received per second, both directions together. *UDP* is what
//! the server has received: the client sends more than anything here carries (`-b 0`) unless
//! `LIVEMIG_BENCH_UDP_RATE` says how many datagrams per second.
//!
//! *Raw WireGuard* is the same client through one hop in which nothing is ours but the device: two
//! `livemig tunnel-device`, configured with `wg`, plain routes from the client over h1 and the tunnel
//! to an iperf3 that runs on h2 itself: no steering, no translation, no container.
//!
//! iperf3 is known not to end when its control connection is disturbed, so what it prints is read line
//! by line as it comes (`--json-stream`), and it is interrupted, and at last killed, from here.
//! `LIVEMIG_BENCH_SECONDS` (30, at least 15) of each run; `LIVEMIG_BENCH_PROTOCOLS` (tcp,udp).

#[path = "../tests/lab/mod.rs"]
mod lab;
mod record;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use lab::pair::{self, Pair};
use lab::{Lab, Node, Process};
use record::number;
use record::svg::{Anchor, Drawing, Stroke};
use serde_json::{Value, json};

const PORT: &str = "5201";
/// What iperf3 may take beyond the time it was given.
const GRACE: Duration = Duration::from_secs(10);
/// How long a migration may take, in seconds.
const MOST: u64 = 40;
/// TCP needs a moment to be as fast as it can; these seconds do not count.
const SETTLED: f64 = 1.5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }

    /// What is measured, for people.
    fn unit(self) -> &'static str {
        match self {
            Protocol::Tcp => "Mbit/s, both directions",
            Protocol::Udp => "datagrams/s received",
        }
    }

    /// What the client does beside where and how long.
    fn options(self) -> Vec<String> {
        match self {
            Protocol::Tcp => vec!["--bidir".into()],
            Protocol::Udp => {
                let rate: u64 = record::setting("LIVEMIG_BENCH_UDP_RATE", 0);
                let bits = (rate * 16 * 8).to_string();
                ["-u", "-l", "16", "-b", &bits].map(String::from).into()
            }
        }
    }
}

/// What passed in one interval, in seconds since the client began.
#[derive(Debug, Clone, Copy)]
struct Sample {
    from: f64,
    to: f64,
    rate: f64,
}

/// One run.
#[derive(Debug)]
struct Run {
    protocol: Protocol,
    shortened: bool,
    samples: Vec<Sample>,
    /// When the migrations began and ended, and what they reported.
    migrations: Vec<(f64, f64, Value)>,
    /// Whether the client was still at work when all was over.
    alive: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    if !record::wanted() {
        return ExitCode::SUCCESS;
    }
    let seconds: u64 = record::setting("LIVEMIG_BENCH_SECONDS", 30).max(15);
    let raw_tcp = raw(Protocol::Tcp, 6).await;
    let raw_udp = raw(Protocol::Udp, 6).await;
    println!("raw WireGuard, one hop: {raw_tcp:.0} Mbit/s, {raw_udp:.0} datagrams/s\n");

    let mut runs = Vec::new();
    let wanted = record::choice("LIVEMIG_BENCH_PROTOCOLS", "tcp,udp");
    let mut protocols = vec![Protocol::Tcp, Protocol::Udp];
    protocols.retain(|protocol| wanted.iter().any(|name| name == protocol.name()));
    for protocol in protocols {
        for shortened in [true, false] {
            if let Some(run) = measure(protocol, shortened, seconds).await {
                show(&run);
                runs.push(run);
            }
        }
    }
    println!();
    record::write("iperf.svg", &chart(&runs));
    let result = json!({
        "tcp_mbps": summary(&runs, Protocol::Tcp),
        "udp_pps": summary(&runs, Protocol::Udp),
        "raw_wireguard_mbps": raw_tcp,
        "raw_wireguard_pps": raw_udp,
        "raw_wireguard": "client c1, plain routes over h1 and one tunnel to iperf3 on h2 itself",
        "runs": runs.iter().map(Run::json).collect::<Vec<_>>(),
    });
    record::write_json("iperf.json", &result);
    if verdict(&result, &runs) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

// ------------------------------------------------------------------------------------------------
// Measuring
// ------------------------------------------------------------------------------------------------

/// One run, on fresh hosts. None if this livemig cannot be told not to shorten paths.
async fn measure(protocol: Protocol, shortened: bool, seconds: u64) -> Option<Run> {
    let pair = Pair::of(Lab::builder(3).with("iperf3")).await;
    let (h1, c1) = (pair.host(1), pair.client(1));
    let mut options: &[&str] = &[];
    if !shortened {
        let help = h1.exec(&["livemig", "migrate", "--help"]).await;
        if !help.stdout.contains("--keep-chain") {
            pair.down().await;
            return None;
        }
        options = &["--keep-chain"];
    }
    let (tcp, udp) = (format!("{PORT}:{PORT}"), format!("{PORT}:{PORT}/udp"));
    let mut server = vec![
        "podman", "run", "-d", "--name", "iperf", "-p", &tcp, "-p", &udp,
    ];
    server.extend([lab::IPERF3, "-s", "--json-stream", "--forceflush"]);
    h1.exec(&server).await;
    h1.sh(&format!(
        "pid=$(podman inspect -f '{{{{.State.Pid}}}}' iperf)
         for i in $(seq 500); do nsenter -t $pid -n ss -Hltn | grep -q ':{PORT} ' && exit; sleep 0.02; done
         exit 1"
    ))
    .await;

    // It is ended when all has been seen: how long a migration takes under such a load is not known.
    let mut client = start(c1, &h1.ip(), protocol, seconds + MOST * 2).await;
    let began = Instant::now();
    let part = |share: f64| tokio::time::sleep(Duration::from_secs_f64(seconds as f64 * share));
    let mut migrations = Vec::new();
    part(0.2).await;
    for (from, to) in [(1, 2), (2, 3)] {
        let begin = began.elapsed().as_secs_f64();
        let moving = pair.try_migrate("iperf", from, to, options);
        let moved = tokio::time::timeout(Duration::from_secs(MOST), moving).await;
        let end = began.elapsed().as_secs_f64();
        let report = match moved {
            Ok(moved) if moved.status.success() => pair::report(&moved),
            Ok(moved) => {
                eprintln!("the container did not move:\n{}", moved.stderr);
                Value::Null
            }
            Err(_) => {
                eprintln!("the migration from h{from} to h{to} took longer than {MOST} s");
                Value::Null
            }
        };
        let failed = report.is_null();
        migrations.push((begin, end, report));
        if failed {
            break;
        }
        part(0.27).await;
    }
    let alive = client.is_running() && !client.stdout().contains("\"event\":\"error\"");
    client.signal(rustix::process::Signal::INT);
    let said = finish(&mut client, Instant::now() + GRACE).await;
    drop(client);
    let mut run = Run {
        protocol,
        shortened,
        samples: Vec::new(),
        migrations,
        alive,
    };
    run.samples = match protocol {
        Protocol::Tcp => samples(&said, protocol),
        Protocol::Udp => {
            let last = run.migrations.iter().take_while(|(.., r)| r.is_object());
            let host = pair.host(1 + last.count());
            // What it wrote before it moved has moved with it.
            let log = host.exec(&["podman", "logs", "iperf"]).await;
            run.in_client_time(samples(&log.stdout, protocol))
        }
    };
    pair.down().await;
    Some(run)
}

/// A client that has connected.
async fn start(client: &Node, server: &str, protocol: Protocol, seconds: u64) -> Process {
    let seconds = seconds.to_string();
    let mut command = vec!["iperf3", "-c", server, "-p", PORT, "-t", &seconds];
    command.extend(["--json-stream", "--forceflush", "--connect-timeout", "5000"]);
    let options = protocol.options();
    command.extend(options.iter().map(String::as_str));
    let process = client.spawn_command(&command);
    process.wait_for("\"event\":\"start\"").await;
    process
}

/// Waits for the end of the test, or of the time for it; returns what was printed.
async fn finish(client: &mut Process, deadline: Instant) -> String {
    while client.is_running() && Instant::now() < deadline {
        if client.stdout().contains("\"event\":\"end\"") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    client.stdout()
}

/// One hop of WireGuard without anything of ours around it.
async fn raw(protocol: Protocol, seconds: u64) -> f64 {
    let lab = Lab::builder(2).with("iperf3").up().await;
    let (h1, h2, c1) = (lab.host(1), lab.host(2), lab.client(1));
    let mut devices = Vec::new();
    let mut keys = Vec::new();
    for host in [h1, h2] {
        let socket = "/var/run/wireguard/raw.sock";
        devices.push(host.spawn_command(&["livemig", "tunnel-device", "raw", socket]));
        let key = host
            .sh("umask 077; wg genkey >/tmp/raw.key; wg pubkey </tmp/raw.key
                 for i in $(seq 500); do wg show raw >/dev/null 2>&1 && exit; sleep 0.02; done; exit 1")
            .await;
        keys.push(key.text().to_owned());
    }
    // The client's packets come out at h2 as they are, and its answers go back the same way.
    for (host, own, peer, key, route) in [
        (h1, "10.99.0.1/30", h2, &keys[1], "true"),
        (
            h2,
            "10.99.0.2/30",
            h1,
            &keys[0],
            "ip route add 10.77.0.101/32 dev raw",
        ),
    ] {
        host.sh(&format!(
            "wg set raw private-key /tmp/raw.key listen-port 51900 peer {key} \
                 allowed-ips 0.0.0.0/0 endpoint {}:51900
             ip addr add {own} dev raw; ip link set raw mtu 1420 up; {route}",
            peer.ip()
        ))
        .await;
    }
    c1.sh(&format!("ip route add 10.99.0.0/30 via {}", h1.ip()))
        .await;
    let server = h2.spawn_command(&["iperf3", "-s", "--json-stream", "--forceflush"]);
    h2.sh(&format!(
        "for i in $(seq 500); do ss -Hltn | grep -q ':{PORT} ' && exit; sleep 0.02; done; exit 1"
    ))
    .await;
    let mut client = start(c1, "10.99.0.2", protocol, seconds).await;
    let deadline = Instant::now() + Duration::from_secs(seconds) + GRACE;
    let said = finish(&mut client, deadline).await;
    let samples = match protocol {
        Protocol::Tcp => samples(&said, protocol),
        Protocol::Udp => samples(&server.stdout(), protocol),
    };
    drop((client, server, devices));
    lab.down().await;
    mean(&samples, SETTLED, f64::INFINITY)
}

/// The intervals in what iperf3 printed.
fn samples(text: &str, protocol: Protocol) -> Vec<Sample> {
    let interval = |line: &str| {
        let event: Value = serde_json::from_str(line).ok()?;
        if event["event"] != "interval" {
            return None;
        }
        let (there, back) = (&event["data"]["sum"], &event["data"]["sum_bidir_reverse"]);
        let (from, to) = (there["start"].as_f64()?, there["end"].as_f64()?);
        let rate = match protocol {
            Protocol::Tcp => {
                let back = back["bits_per_second"].as_f64().unwrap_or(0.0);
                (there["bits_per_second"].as_f64()? + back) / 1e6
            }
            // `packets` is how many were sent in this time, as far as the server knows.
            Protocol::Udp => there["bytes"].as_f64()? / 16.0 / (to - from),
        };
        Some(Sample { from, to, rate })
    };
    let mut samples: Vec<Sample> = text.lines().filter_map(interval).collect();
    // A server whose client went without a word says its last interval twice.
    samples.dedup_by(|next, last| next.from <= last.from);
    samples
}

/// The mean of the intervals that lie between these times.
fn mean(samples: &[Sample], from: f64, to: f64) -> f64 {
    let within = samples.iter().filter(|s| s.from >= from && s.to <= to);
    let (mut sum, mut length) = (0.0, 0.0);
    for sample in within {
        sum += sample.rate * (sample.to - sample.from);
        length += sample.to - sample.from;
    }
    sum / length
}

impl Run {
    /// The server's clock stands still while it is moved: restored, it goes on from where it was.
    fn in_client_time(&self, mut samples: Vec<Sample>) -> Vec<Sample> {
        for (_, end, report) in &self.migrations {
            let still = report["downtime_ms"].as_f64().unwrap_or(0.0) / 1e3;
            for sample in &mut samples {
                if sample.to + still > *end {
                    sample.to += still;
                    if sample.from + still > *end {
                        sample.from += still;
                    }
                }
            }
        }
        samples
    }

    /// Before the first migration, between them, and after the second.
    fn phases(&self) -> [f64; 3] {
        let time = |at: usize| self.migrations.get(at).map(|m| (m.0, m.1));
        let (first, second) = (time(0), time(1));
        let none = f64::NAN;
        [
            first.map_or(none, |(begin, _)| mean(&self.samples, SETTLED, begin + 0.2)),
            first.zip(second).map_or(none, |((_, end), (begin, _))| {
                mean(&self.samples, end + SETTLED, begin + 0.2)
            }),
            second.map_or(none, |(_, end)| {
                mean(&self.samples, end + SETTLED, f64::INFINITY)
            }),
        ]
    }

    /// Whether the client went through all of it.
    fn survived(&self) -> bool {
        let last = self.samples.last().is_some_and(|sample| sample.rate > 0.0);
        let moved = self.migrations.iter().filter(|m| m.2.is_object()).count();
        self.alive && last && moved == 2
    }

    fn json(&self) -> Value {
        let [before, first, second] = self.phases();
        let samples = self.samples.iter();
        json!({
            "protocol": self.protocol.name(),
            "unit": self.protocol.unit(),
            "keep_chain": !self.shortened,
            "survived": self.survived(),
            "before": before, "after_first": first, "after_second": second,
            "migrations": self.migrations.iter().map(|(begin, end, report)| json!({
                "begin_s": begin, "end_s": end, "report": report,
            })).collect::<Vec<_>>(),
            "per_second": samples.map(|s| json!({
                "from_s": s.from, "to_s": s.to, "rate": s.rate,
            })).collect::<Vec<_>>(),
        })
    }
}

// ------------------------------------------------------------------------------------------------
// Showing
// ------------------------------------------------------------------------------------------------

fn show(run: &Run) {
    let [before, first, second] = run.phases();
    println!(
        "{:<4} {:<10} before {before:>9.0}  after the first {first:>9.0}  after the second {second:>9.0}  {}{}",
        run.protocol.name(),
        if run.shortened {
            "shortened"
        } else {
            "chain kept"
        },
        run.protocol.unit(),
        if run.survived() {
            ""
        } else {
            "  did NOT survive"
        },
    );
}

/// The figures of one protocol. `before` and `after_first` are those of the run with shortening.
fn summary(runs: &[Run], protocol: Protocol) -> Value {
    let of = |shortened: bool| {
        runs.iter()
            .find(|run| run.protocol == protocol && run.shortened == shortened)
            .map(Run::phases)
    };
    let at = |phases: Option<[f64; 3]>, index: usize| phases.map(|phases| phases[index]);
    json!({
        "before": at(of(true), 0),
        "after_first": at(of(true), 1),
        "after_second": at(of(true), 2),
        "after_first_unshortened": at(of(false), 1),
        "after_second_unshortened": at(of(false), 2),
    })
}

fn verdict(result: &Value, runs: &[Run]) -> bool {
    let mut passed = runs.iter().all(Run::survived);
    if !passed {
        println!("FAIL: not every client came through both migrations to its end");
    }
    for (key, raw) in [
        ("tcp_mbps", &result["raw_wireguard_mbps"]),
        ("udp_pps", &result["raw_wireguard_pps"]),
    ] {
        let of = |phase: &str| number(&result[key][phase]);
        let (first, second) = (of("after_first"), of("after_second"));
        println!(
            "{key}: one hop carries {:.2} of raw WireGuard; after the second migration {:.2} of after \
             the first, with the chain kept {:.2}",
            first / number(raw),
            second / first,
            of("after_second_unshortened") / of("after_first_unshortened"),
        );
        if key == "tcp_mbps" && first.is_finite() {
            let good = second >= 0.95 * first;
            println!(
                "{}: 0.95 or more is asked for",
                if good { "PASS" } else { "FAIL" }
            );
            passed &= good;
        }
    }
    passed
}

/// Throughput by second: a panel for each protocol, a line for each run, a mark for each migration.
fn chart(runs: &[Run]) -> String {
    const WIDTH: f64 = 860.0;
    const LEFT: f64 = 80.0;
    const PANEL: f64 = 230.0;
    const GAP: f64 = 90.0;
    const TOP: f64 = 50.0;
    let last = runs.iter().filter_map(|run| run.samples.last());
    let seconds = last.map(|sample| sample.to).fold(1.0, f64::max).ceil();
    let mut drawing = Drawing::new(1000.0, TOP + 2.0 * (PANEL + GAP));
    let x = |at: f64| LEFT + WIDTH * at / seconds;
    for (index, protocol) in [Protocol::Tcp, Protocol::Udp].into_iter().enumerate() {
        let of: Vec<&Run> = runs.iter().filter(|run| run.protocol == protocol).collect();
        let bottom = TOP + PANEL + index as f64 * (PANEL + GAP);
        // By powers of ten: a tunnel carries so much less than a bridge that the differences after
        // the first migration would be a line on the axis.
        let rates = of.iter().flat_map(|run| run.samples.iter().map(|s| s.rate));
        let mut rates: Vec<f64> = rates.filter(|rate| *rate > 0.0).collect();
        rates.sort_by(f64::total_cmp);
        // Moments in which next to nothing passes may lie on the axis.
        let at = |index: usize| rates.get(index).copied().unwrap_or(1.0).log10();
        let top = at(rates.len().saturating_sub(1)).ceil();
        let decades = (top - at(rates.len() / 10).floor()).clamp(1.0, 4.0);
        let y = |rate: f64| {
            let below = top - rate.max(1e-9).log10();
            bottom - PANEL * (1.0 - below / decades).clamp(0.0, 1.0)
        };
        let name = protocol.name().to_uppercase();
        let heading = format!("iperf3 {name}: {}", protocol.unit());
        drawing.heading((LEFT, bottom - PANEL - 14.0), &heading);
        for tick in 0..=decades as i32 {
            let value = 10f64.powf(top - f64::from(tick));
            let at = y(value);
            drawing.line((LEFT, at), (LEFT + WIDTH, at), Stroke::GRID);
            let value = format!("{value:.0}");
            drawing.text((LEFT - 8.0, at + 4.0), Anchor::Left, &value);
        }
        for second in (0..=seconds as u32).step_by(5) {
            let unit = if second == 0 { " s" } else { "" };
            let at = (x(second.into()), bottom + 18.0);
            drawing.text(at, Anchor::Middle, &format!("{second}{unit}"));
        }
        for (number, run) in of.iter().enumerate() {
            let (stroke, label) = if run.shortened {
                let stroke = Stroke::new("#0b62a4", 2.0);
                (stroke, "path shortened (default)")
            } else {
                let stroke = Stroke::new("#c4531a", 2.0).dashed();
                (stroke, "chain kept (--keep-chain)")
            };
            for (at, (begin, end, _)) in run.migrations.iter().enumerate() {
                let corner = (x(*begin), bottom - PANEL);
                let size = (x(*end) - x(*begin), PANEL);
                drawing.bar(corner, size, stroke.colour, 0.12);
                if number == 0 {
                    let hosts = format!("h{}→h{}", at + 1, at + 2);
                    drawing.text((corner.0 + 2.0, corner.1 + 14.0), Anchor::Right, &hosts);
                }
            }
            let points = run.samples.iter();
            let points = points.map(|s| (x(f64::midpoint(s.from, s.to)), y(s.rate)));
            drawing.path(points, stroke);
            let key = (LEFT + number as f64 * 260.0, bottom + 38.0);
            drawing.key(key, stroke, label);
        }
    }
    drawing.finish()
}
