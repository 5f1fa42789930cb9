//! `make test-vm` and `make demo-vm`: migrations between two virtual machines, set up as the README tells.
//!
//! What they have and the lab's hosts do not is shown by its own tools in each migration: WireGuard in the
//! kernel (`ip`, `wg`), nftables' queue (`nft monitor`), soft-dirty tracking (`criu check`), systemd. A
//! client on a third machine checks every answer over one TCP connection.
//!
//! `LIVEMIG_VM_RUNTIMES`, `_ENGINES` and `_WORKLOADS` choose among them, by their names in the table;
//! `LIVEMIG_VM_PARTS` among these `migrations` and what comes after them, `clocks` and `power`.
//!
//! `demo` moves a small container with each engine and says what came of it; `test` moves one for every
//! runtime, workload and engine, and writes `target/bench/vm.json` and `vm-growth.svg`. Software emulation
//! makes everything some ten times slower, and not evenly so: of its figures only ratios mean anything.

#[path = "clocks.rs"]
mod clocks;
#[path = "growth.rs"]
mod growth;
#[path = "../lab/mod.rs"]
mod lab;
#[path = "power.rs"]
mod power;
#[path = "../../benches/record/mod.rs"]
mod record;
#[path = "rounds.rs"]
mod rounds;
#[path = "standstill.rs"]
mod standstill;

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use lab::{IMAGE, Lab, Node, gate};
use record::number;
use serde_json::{Value, json};

const PORT: &str = "7000";

/// All of it, from the start of the machines. On two cores that others used as well it took 7 minutes, and
/// `clocks` and `power` 4 more.
const BOUND: Duration = Duration::from_secs(25 * 60);

/// What of a container's packets goes through the tunnel is counted again after this long.
const WHILE: Duration = Duration::from_secs(3);

/// A way to migrate, and what it wants to be told.
struct Engine {
    name: &'static str,
    options: &'static [&'static str],
    /// What the report calls it.
    kind: &'static str,
}

const ENGINES: [Engine; 5] = [
    Engine {
        name: "rest",
        options: &["--engine", "rest"],
        kind: "rest",
    },
    Engine {
        name: "direct",
        options: &["--engine", "direct", "--rounds", "0"],
        kind: "direct",
    },
    Engine {
        name: "precopy",
        options: &["--engine", "direct"],
        kind: "direct",
    },
    Engine {
        name: "postcopy",
        options: &["--engine", "direct", "--post-copy", "--rounds", "0"],
        kind: "direct",
    },
    Engine {
        name: "hybrid",
        options: &["--engine", "direct", "--post-copy"],
        kind: "direct",
    },
];

/// The one that Podman has by default comes first.
const RUNTIMES: [&str; 2] = ["crun", "runc"];

/// What runs in a container. All of them answer the client.
struct Workload {
    name: &'static str,
    /// Its memory in MiB; none that counts where it only echoes.
    memory: u64,
    /// How much of that is written to in a second, in percent.
    percent: f64,
    /// How it is moved.
    engines: &'static [&'static str],
    /// Under which runtimes.
    runtimes: &'static [&'static str],
}

/// Of the second's memory 1 % is written to in each second: a tenth of what the other benches have, for memory
/// crosses here at a tenth of their rate. Of those that grow the same amount is.
const WORKLOADS: [Workload; 5] = [
    Workload {
        name: "echo",
        memory: 0,
        percent: 0.0,
        engines: &["rest", "direct"],
        runtimes: &RUNTIMES,
    },
    Workload {
        name: "64MiB-dirty",
        memory: 64,
        percent: 1.0,
        engines: &["rest", "direct", "precopy", "postcopy", "hybrid"],
        runtimes: &RUNTIMES,
    },
    growing("64MiB-steady", 64, 2.0),
    growing("128MiB-steady", 128, 1.0),
    growing("256MiB-steady", 256, 0.5),
];

/// One of those that show what becomes of the downtime when there is more memory.
const fn growing(name: &'static str, memory: u64, percent: f64) -> Workload {
    Workload {
        name,
        memory,
        percent,
        engines: &growth::ENGINES,
        runtimes: &[growth::RUNTIME],
    }
}

impl Workload {
    /// The arguments of the workload program.
    fn command(&self) -> Vec<String> {
        let (memory, percent) = (self.memory.to_string(), self.percent.to_string());
        let words = match self.memory {
            0 => vec!["echo", PORT],
            _ => vec!["touch", &memory, &percent, PORT],
        };
        words.into_iter().map(str::to_owned).collect()
    }
}

/// What is being done, for whoever waits, and for the error when it takes too long.
struct Clock {
    started: Instant,
    doing: Mutex<String>,
}

impl Clock {
    fn step(&self, node: &str, what: &str) {
        println!(
            "[{:4.0} s] {node}$ {what}",
            self.started.elapsed().as_secs_f64()
        );
        let _ = std::io::stdout().flush();
        *self.doing.lock().expect("nobody panics with it") = format!("{node}: {what}");
    }

    /// What came of it.
    fn show(&self, what: &str) {
        for line in what.lines() {
            println!("           {line}");
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    // `cargo test --all-targets` starts this as well, without the flag that `cargo bench` gives.
    if !record::wanted() {
        return ExitCode::SUCCESS;
    }
    let asked = |word: &str| std::env::args().any(|argument| argument == word);
    let all = asked("test");
    if !all && !asked("demo") {
        eprintln!("demo or test?");
        return ExitCode::from(2);
    }
    let clock = Clock {
        started: Instant::now(),
        doing: Mutex::default(),
    };
    let Ok(cells) = tokio::time::timeout(BOUND, migrations(&clock, all)).await else {
        let doing = clock.doing.lock().expect("nobody panics with it");
        eprintln!("not through after {BOUND:?}; at last it did this: {doing}");
        return ExitCode::FAILURE;
    };
    if !cells.is_empty() {
        table(&cells);
    }
    if all && !cells.is_empty() {
        record::write_json("vm.json", &json!(cells));
        downtimes(&cells);
        growth::judge(&cells);
    }
    let took = clock.started.elapsed().as_secs_f64() / 60.0;
    println!("{took:.1} minutes, everything as it should be. The machines are gone again.");
    ExitCode::SUCCESS
}

/// Panics when something is not as it should be.
async fn migrations(clock: &Clock, all: bool) -> Vec<Value> {
    clock.step("", "tests/vm/vm up");
    let lab = Lab::of_machines().await;
    let (a, b) = (lab.host(1), lab.host(2));
    tokio::join!(install(clock, a), install(clock, b));
    introduce(clock, a, b).await;
    let mut cells: Vec<Value> = Vec::new();
    let mut now = "";
    let parts = record::choice("LIVEMIG_VM_PARTS", "migrations,clocks,power");
    let part = |name: &str| parts.iter().any(|part| part == name);
    let cases = match part("migrations") {
        true => cases(all),
        false => Vec::new(),
    };
    for case in cases {
        if case.runtime != now {
            now = case.runtime;
            tokio::join!(choose_runtime(clock, a, now), choose_runtime(clock, b, now));
        }
        let mut cell = migration(clock, &lab, &case).await;
        cell["first"] = json!(cells.is_empty());
        cells.push(cell);
        // Under crun it is CRIU that stops the processes in a round.
        if case.engine.name == "precopy"
            && case.runtime == "runc"
            && case.workload.name == "64MiB-dirty"
        {
            rounds::stand_still_only_for_criu(clock, &lab).await;
            rounds::struck_in_the_midst(clock, &lab).await;
        }
    }
    if all && part("clocks") {
        clocks::jump(clock, &lab).await;
    }
    if all && part("power") {
        power::cut_in_the_midst(clock, &lab).await;
    }
    lab.down().await;
    cells
}

/// One migration.
struct Case {
    engine: &'static Engine,
    runtime: &'static str,
    workload: &'static Workload,
}

/// The first shows what it shows, but the machines have all to load: its times are no measure.
fn cases(all: bool) -> Vec<Case> {
    let engines = record::choice("LIVEMIG_VM_ENGINES", &ENGINES.map(|e| e.name).join(","));
    let runtimes = record::choice("LIVEMIG_VM_RUNTIMES", &RUNTIMES.join(","));
    let workloads = record::choice("LIVEMIG_VM_WORKLOADS", &WORKLOADS.map(|w| w.name).join(","));
    let chosen = |list: &[String], name: &str| list.iter().any(|one| one == name);
    let mut cases = Vec::new();
    for runtime in RUNTIMES {
        for workload in &WORKLOADS {
            for engine in &ENGINES {
                let useful =
                    workload.engines.contains(&engine.name) && workload.runtimes.contains(&runtime);
                let chosen = chosen(&runtimes, runtime)
                    && chosen(&workloads, workload.name)
                    && chosen(&engines, engine.name);
                if useful && chosen {
                    cases.push(Case {
                        engine,
                        runtime,
                        workload,
                    });
                }
            }
        }
    }
    if all {
        let first = &WORKLOADS[0];
        cases.insert(
            0,
            Case {
                engine: &ENGINES[0],
                runtime: RUNTIMES[0],
                workload: first,
            },
        );
    } else {
        // The small container, with the first runtime.
        cases.retain(|case| case.runtime == RUNTIMES[0] && case.workload.memory == 0);
    }
    cases
}

/// What the README says under "Two machines, step by step".
async fn install(clock: &Clock, host: &Node) {
    clock.step(
        host.name(),
        "install livemig, its service, and the runtime wrapper",
    );
    host.sh("install /opt/livemig/livemig /usr/local/bin/
         install -m 644 /opt/livemig/livemig-agent.service /etc/systemd/system/
         sysctl -qw net.ipv4.ip_forward=1
         livemig setup
         systemctl enable --now podman.socket livemig-agent
         podman load -q -i /opt/livemig/image.tar")
        .await;
    let has = host
        .sh("uname -sr; . /etc/os-release; echo $PRETTY_NAME
             podman --version; criu --version | head -n1
             echo livemig-agent.service: $(systemctl is-active livemig-agent)
             criu check --feature mem_dirty_track")
        .await;
    let has = has.stdout.replace('\n', ", ");
    clock.show(&format!("host-{}: {has}", host.name()));
    assert!(has.contains("livemig-agent.service: active"), "{has}");
    assert!(has.contains("mem_dirty_track is supported"), "{has}");
}

async fn introduce(clock: &Clock, a: &Node, b: &Node) {
    clock.step("b", "livemig invite");
    let token = b.exec(&["livemig", "invite", "--address", &b.ip()]).await;
    clock.step("a", "livemig join");
    let token = token.text();
    let own = a.ip();
    a.exec(&[
        "livemig",
        "join",
        token,
        "--name",
        "host-b",
        "--address",
        &own,
    ])
    .await;
}

/// Makes it Podman's default, which has to be the same on both hosts.
async fn choose_runtime(clock: &Clock, host: &Node, runtime: &str) {
    clock.step(host.name(), &format!("Podman's runtime is {runtime} now"));
    host.sh(&format!(
        "mkdir -p /etc/containers/containers.conf.d
         printf '[engine]\\nruntime = \"{runtime}\"\\n' >/etc/containers/containers.conf.d/50-runtime.conf
         systemctl restart podman.service livemig-agent"
    ))
    .await;
}

/// One container, from `a` to `b`, with a connection from the client.
async fn migration(clock: &Clock, lab: &Lab, case: &Case) -> Value {
    let (a, b, client) = (lab.host(1), lab.host(2), lab.client(1));
    let Case {
        engine,
        runtime,
        workload,
    } = case;
    let command = workload.command();
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let Workload {
        name: workload,
        memory,
        percent,
        ..
    } = **workload;
    let case = format!("{} {runtime} {workload}", engine.name);
    println!("\n== {case}");
    clock.step(
        "a",
        &format!(
            "podman run -d --name web -p {PORT}:{PORT} {IMAGE} {}",
            command.join(" ")
        ),
    );
    let publish = format!("{PORT}:{PORT}");
    a.run_workload("web", &["-p", &publish], &command).await;
    clock.step(
        "c1",
        &format!("one connection to {}:{PORT}, a request every 10 ms", a.ip()),
    );
    let client = client
        .spawn(&[
            "client-echo",
            &a.ip(),
            PORT,
            "--every-ms",
            "10",
            "--grace-ms",
            "60000",
        ])
        .await;

    clock.step("a", "livemig check web --to host-b");
    let checked = a.exec(&["livemig", "check", "web", "--to", "host-b"]).await;
    clock.show(checked.stdout.lines().last().unwrap_or_default());

    let monitor = a.spawn_command(&["nft", "monitor", "rules"]);
    let arguments = [
        &["livemig", "migrate", "web", "--to", "host-b", "--json"],
        engine.options,
    ]
    .concat();
    clock.step("a", &arguments.join(" "));
    let migrated = a.exec(&arguments).await;
    let report = report_in(&migrated.stdout);
    clock.show(&format!(
        "{} ms without service, {} ms in all",
        report["downtime_ms"], report["total_ms"]
    ));

    clock.step("a", "nft monitor, while it happened:");
    let queue = queue_rule(&monitor.stdout());
    clock.show(&queue);
    let held = &report["held"]["held"];
    clock.show(&format!(
        "{held} packets waited in it, {} of them were let go",
        report["held"]["released"]
    ));
    // Its other end is in the machine, and does not hear that this one goes.
    a.exec(&["pkill", "nft"]).await;
    assert!(
        held.as_u64().is_some_and(|held| held > 0),
        "{case}: nothing waited: {report:#}"
    );

    for host in [a, b] {
        clock.step(
            host.name(),
            "systemctl restart systemd-networkd, which tidies up what is not its own",
        );
        host.exec(&["systemctl", "restart", "systemd-networkd"])
            .await;
    }
    for host in [a, b] {
        clock.step(
            host.name(),
            "ip -d link show type wireguard; wg show all transfer",
        );
        let before = carried(host).await;
        tokio::time::sleep(WHILE).await;
        let now = carried(host).await;
        clock.show(&format!(
            "a device of kind wireguard: {} bytes in and {} out, {WHILE:?} later {} and {}",
            before.0, before.1, now.0, now.1
        ));
        assert!(
            now.0 > before.0 && now.1 > before.1,
            "{case}: {before:?}, then {now:?}"
        );
    }

    let seen = client.stop().await;
    clock.step("c1", "what the client saw");
    clock.show(&format!(
        "{} → {}: {} requests, {} replies, {} wrong, {} unanswered, {} resets; longest gap {} ms",
        seen["local"],
        seen["peer"],
        seen["requests"],
        seen["replies"],
        seen["wrong"],
        seen["unanswered"],
        seen["resets"],
        seen["longest_gap_ms"]
    ));
    let zero = |key: &str| seen[key] == 0;
    let survived =
        seen["same_socket"] == true && zero("resets") && zero("unanswered") && zero("wrong");
    assert!(
        survived,
        "{case}: the connection did not survive: {seen:#}\n{report:#}"
    );
    assert_eq!(
        b.container_state("web").await.as_deref(),
        Some("running"),
        "{case}"
    );
    assert_eq!(a.container_state("web").await, None, "{case}");
    assert_eq!(
        report["engine"], engine.kind,
        "{case}: another engine was used"
    );
    if memory > 0 {
        clock.step("c1", "every page of the container's memory");
        let pages = lab.client(1).ask(b.address(), 7000, "memory").await;
        clock.show(&pages.to_string());
        assert_eq!(pages["pages"], memory * 256, "{case}: {pages}");
        assert_eq!(pages["wrong"], 0, "{case}: {pages}");
        assert_eq!(pages["stale"], 0, "{case}: {pages}");
        let written = (memory << 20) as f64 * percent / 100.0;
        went_ahead(clock, &case, engine, memory << 20, written, &report);
    }
    b.exec(&["podman", "rm", "--force", "--time", "0", "web"])
        .await;
    json!({
        "engine": engine.name,
        "runtime": runtime,
        "workload": workload,
        "mib": memory,
        "gap_ms": seen["longest_gap_ms"],
        "downtime_ms": report["downtime_ms"],
        "frozen_ms": frozen(&report),
        "bytes_frozen": report["bytes_frozen"],
        "bytes_sent": report["bytes_sent"],
        "total_ms": report["total_ms"],
        "survived": survived,
        "wireguard": "kernel",
        "queue": "nftables",
        "rounds": report["rounds"],
        "phases": report["phases"],
    })
}

/// Looks at how much memory went when, of a container that writes to so many bytes in a second.
fn went_ahead(
    clock: &Clock,
    case: &str,
    engine: &Engine,
    memory: u64,
    written: f64,
    report: &Value,
) {
    let rounds = report["rounds"].as_array().map_or(&[][..], Vec::as_slice);
    let (frozen, sent) = (
        number(&report["bytes_frozen"]),
        number(&report["bytes_sent"]),
    );
    let mib = |bytes: f64| format!("{:.1}", bytes / f64::from(1 << 20));
    let of_rounds: Vec<f64> = rounds.iter().map(|round| number(&round["bytes"])).collect();
    clock.show(&format!(
        "{} MiB of memory; in rounds of MiB {:?}; in the downtime {} MiB; in all {} MiB",
        mib(memory as f64),
        of_rounds
            .iter()
            .map(|bytes| mib(*bytes))
            .collect::<Vec<_>>(),
        mib(frozen),
        mib(sent)
    ));
    let memory = memory as f64;
    match engine.name {
        "precopy" => {
            assert!(rounds.len() >= 2, "{case}: only {rounds:?}");
            // Since the last round began, and what was between the rounds.
            let phase = |name: &str| {
                let phases = report["phases"].as_array().into_iter().flatten();
                let phase = phases.filter(|phase| phase["name"] == name);
                phase.map(|phase| number(&phase["ms"])).sum::<f64>()
            };
            let before: f64 = rounds[..rounds.len() - 1]
                .iter()
                .map(|round| number(&round["ms"]))
                .sum();
            let seconds = (phase("precopy") - before + phase("hold")) / 1e3;
            let changed = written * seconds;
            // What is written to is known in huge pages of 2 MiB, of which one is begun and one ended; stacks
            // and what CRIU itself needs come on top.
            let most = changed + f64::from(5 << 20);
            clock.show(&format!(
                "since the last round began at most {} MiB were written to, in {seconds:.1} s",
                mib(changed)
            ));
            assert!(
                frozen <= most,
                "{case}: {frozen} bytes, {most} expected: {report:#}"
            );
            assert!(frozen < memory / 2.0, "{case}: {frozen} bytes");
        }
        "postcopy" | "hybrid" => {
            assert!(frozen < f64::from(1 << 20), "{case}: {frozen} bytes");
            assert!(sent > memory, "{case}: {sent} bytes");
            let ahead: f64 = of_rounds.iter().sum();
            assert_eq!(rounds.len(), usize::from(engine.name == "hybrid"), "{case}");
            // What came after the move is only what the round has not brought.
            assert!(
                ahead == 0.0 || sent - ahead < memory / 2.0,
                "{case}: {report:#}"
            );
        }
        _ => assert!(rounds.is_empty(), "{case}: {rounds:?}"),
    }
}

/// The report, the last of the lines of JSON.
fn report_in(lines: &str) -> Value {
    lines
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|event| event["event"] == "report")
        .map(|event| event["report"].clone())
        .unwrap_or_else(|| panic!("no report in:\n{lines}"))
}

/// What CRIU says, of the container's processes as it found them.
fn frozen(report: &Value) -> Value {
    let frozen = &report["dump"]["frozen"];
    match (frozen["secs"].as_f64(), frozen["nanos"].as_f64()) {
        (Some(secs), Some(nanos)) => json!(secs * 1e3 + nanos / 1e6),
        _ => report["frozen_ms"].clone(),
    }
}

/// The rule with nftables' own queue: its stand-in from iptables is printed otherwise.
fn queue_rule(monitored: &str) -> String {
    monitored
        .lines()
        .find(|line| {
            line.starts_with("add rule inet livemig") && line.contains(" queue flags bypass to ")
        })
        .unwrap_or_else(|| panic!("no rule with a queue in:\n{monitored}"))
        .to_owned()
}

/// Bytes received and sent by the host's only WireGuard device.
async fn carried(host: &Node) -> (u64, u64) {
    let links = host
        .exec(&["ip", "-j", "-d", "link", "show", "type", "wireguard"])
        .await;
    let links = links.json();
    assert_eq!(links[0]["linkinfo"]["info_kind"], "wireguard", "{links:#}");
    let said = host.exec(&["wg", "show", "all", "transfer"]).await;
    let numbers: Vec<u64> = said
        .stdout
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    match numbers[..] {
        [received, sent] => (received, sent),
        _ => panic!("not one device with one peer: {said}"),
    }
}

/// The same container under the same runtime, moved in another way.
fn other<'a>(cells: &'a [Value], cell: &Value, engine: &str) -> Option<&'a Value> {
    cells.iter().find(|other| {
        other["engine"] == engine
            && other["first"] == false
            && ["runtime", "workload"]
                .iter()
                .all(|key| other[*key] == cell[*key])
    })
}

/// What pre-copy and post-copy are for.
fn downtimes(cells: &[Value]) {
    for cell in cells {
        let quicker = ["precopy", "postcopy", "hybrid"];
        if !quicker.iter().any(|engine| cell["engine"] == *engine) {
            continue;
        }
        // Not among those that were chosen.
        let Some(direct) = other(cells, cell, "direct") else {
            continue;
        };
        let (ours, theirs) = (&cell["downtime_ms"], &direct["downtime_ms"]);
        assert!(
            number(ours) < number(theirs),
            "{} under {}: {ours} ms without service, and {theirs} ms without it",
            cell["engine"],
            cell["runtime"]
        );
    }
}

fn table(cells: &[Value]) {
    println!(
        "\nfigures under software emulation: only their ratios mean anything (÷ rest: of the gap; ÷ direct: of\n\
         the downtime; the first migration of fresh machines is no measure)\n\
         {:<8} {:<5} {:<13} {:>8} {:>12} {:>10} {:>12} {:>6} {:>9} {:>6} {:>8}",
        "engine",
        "under",
        "workload",
        "gap/ms",
        "downtime/ms",
        "frozen/ms",
        "bytes frozen",
        "rounds",
        "total/ms",
        "÷ rest",
        "÷ direct"
    );
    for cell in cells {
        let text = |key: &str| cell[key].as_str().unwrap_or_default();
        let ratio = |engine: &str, key: &str| match other(cells, cell, engine) {
            _ if cell["first"] == true => "first".to_owned(),
            Some(other) => format!("{:.2}", number(&cell[key]) / number(&other[key])),
            None => String::new(),
        };
        let (rest, direct) = (ratio("rest", "gap_ms"), ratio("direct", "downtime_ms"));
        println!(
            "{:<8} {:<5} {:<13} {:>8.0} {:>12.0} {:>10.0} {:>12} {:>6} {:>9.0} {rest:>6} \
             {direct:>8}",
            text("engine"),
            text("runtime"),
            text("workload"),
            number(&cell["gap_ms"]),
            number(&cell["downtime_ms"]),
            number(&cell["frozen_ms"]),
            cell["bytes_frozen"].to_string(),
            cell["rounds"].as_array().map_or(0, Vec::len),
            number(&cell["total_ms"]),
        );
    }
}
