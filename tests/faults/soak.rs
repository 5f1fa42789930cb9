//! `make test-soak`: one container moves to and fro, again and again, under TCP and UDP load, and every
//! other migration is struck by a fault that is drawn by lot.
//!
//! `LIVEMIG_SOAK_RUNS` migrations; `LIVEMIG_SOAK_SEED` repeats the faults of another run, which printed it.
//! One TCP connection and one UDP socket, both to the first host, live through all of it. Datagrams that
//! waited when livemig was killed are lost, and a bad link loses some: they are counted and shown, and must
//! not be lost where nothing was broken. The first host's agent lives through all of it too (the other one
//! is killed now and then): its memory and its files are measured. The result is in
//! `target/faults/soak.json`.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::fault::Fault;
use super::lab::{LOOK, Process};
use super::moment::{Moment, Move, arguments};
use super::scene::{self, NAME, Scene};

/// Datagrams a second.
const RATE: &str = "200";
/// How often both hosts are compared with what they were, in migrations: always when it is at home.
const CENSUS_EVERY: u64 = 10;
/// After this part of the migrations the agent has had all that it needs for the next ones. (Of 200, its
/// memory grew by 3 MiB in the first 90, more slowly each time, and by nothing in the others.)
const WARM: u64 = 4;
/// One datagram of so many may be lost where nothing was broken: on two processors that are busy with
/// other things as well, one that is on its way through a tunnel comes later than a move waits for it.
const LOST_AT_MOST: u64 = 1000;
/// How much more memory it may have at the end, in KiB. The allocator takes and gives in steps: in 500 migrations
/// the agent had between 30.0 and 32.2 MiB, and in the end as much as after a quarter.
const MORE_MEMORY: u64 = 4096;
/// How many more files.
const MORE_FILES: u64 = 2;

/// SplitMix64.
struct Lot(u64);

impl Lot {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as usize % bound
    }

    /// Nothing for every other migration.
    fn fault(&mut self, to: usize) -> Option<(Moment, Fault)> {
        if self.below(2) == 0 {
            return None;
        }
        loop {
            let moment = Moment::ALL[self.below(Moment::ALL.len())];
            let fault = Fault::ALL[self.below(Fault::ALL.len())];
            let measured = to == 1 && matches!(fault, Fault::AgentKilled | Fault::BothKilled);
            if fault.can_strike(moment) && !fault.takes_long() && !measured {
                return Some((moment, fault));
            }
        }
    }
}

/// What an agent has of the machine.
#[derive(Debug, Clone, Copy, Default)]
struct Has {
    memory_kib: u64,
    files: u64,
}

impl Has {
    fn of(agent: &Process) -> Has {
        let pid = agent.pid().expect("the agent runs");
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let memory = memory.and_then(|text| text.split_whitespace().next()?.parse().ok());
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        Has {
            memory_kib: memory.unwrap_or(0),
            files: files as u64,
        }
    }
}

pub async fn soak() -> ExitCode {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let runs: u64 = number("LIVEMIG_SOAK_RUNS").unwrap_or(40);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |since| since.as_nanos() as u64);
    let seed: u64 = number("LIVEMIG_SOAK_SEED").unwrap_or(now % 1_000_000);
    let engine = match std::env::var("LIVEMIG_FAULTS_ENGINES").as_deref() {
        Ok("direct") => "direct",
        Ok("postcopy") => "postcopy",
        _ => "rest",
    };
    println!("{runs} migrations, engine {engine}, LIVEMIG_SOAK_SEED={seed}\n");
    println!(
        "  n  from to  moment     fault                      exit    runs on  datagrams sent lost twice late  agent of h1: KiB files"
    );
    let mut lot = Lot(seed);
    let mut scene = Scene::set(engine, scene::TCP_AND_UDP).await;
    let address = scene.pair.host(1).ip();
    let client = scene.pair.client(1);
    let tcp = client
        .spawn(&[
            "client-echo",
            &address,
            "7000",
            "--every-ms",
            "5",
            "--grace-ms",
            scene::GRACE_MS,
        ])
        .await;
    let udp = client.spawn_command(&[
        "workload",
        "client-udp",
        &address,
        "7001",
        "--rate",
        RATE,
        "--runs",
        "1000000",
    ]);
    udp.wait_for("ready").await;

    let (mut at, mut rows, mut bad) = (1, Vec::new(), Vec::new());
    let (mut first, mut last) = (None, Has::default());
    // Datagrams lost and sent while nothing was broken.
    let mut spared = [0, 0];
    let mut n = 0;
    // As often as was asked for, and then home.
    while n < runs || at != 1 {
        n += 1;
        let (from, to) = (at, 3 - at);
        // Once it only has to come home, nothing keeps it from that.
        let struck = if n <= runs { lot.fault(to) } else { None };
        let what = Move {
            engine,
            container: NAME,
            from,
            to,
        };
        let ended = match struck {
            None => {
                scene
                    .pair
                    .spawn_migration(NAME, from, to, arguments(engine))
                    .finish()
                    .await
            }
            Some((moment, fault)) => {
                let migration = moment.reach(&scene.pair, what).await;
                fault.strike(moment, &mut scene.pair, what, migration).await
            }
        };
        let recovered = scene
            .pair
            .host(from)
            .try_exec(&["livemig", "--json", "recover"])
            .await;
        let runs_on = scene.where_it_runs().await;
        let counted = next(&udp, n).await;
        let mut wrong = scene.unfinished().await;
        match runs_on.as_slice() {
            [host] if host == "h1" => at = 1,
            [host] if host == "h2" => at = 2,
            _ => wrong.push(format!("it runs on {runs_on:?}")),
        }
        if at == 1 && (n % CENSUS_EVERY == 0 || n >= runs) {
            wrong.extend(scene.beside_the_furniture().await);
        }
        if !recovered.status.success() {
            wrong.push(recovered.to_string());
        }
        if struck.is_none() {
            spared[0] += counted["lost"].as_u64().unwrap_or(0);
            spared[1] += counted["sent"].as_u64().unwrap_or(0);
            if !ended.status.success() {
                wrong.push(format!("nothing was broken: {ended}"));
            }
        }
        last = Has::of(scene.pair.agent(1));
        if n == runs.div_ceil(WARM) {
            first = Some(last);
        }
        let name = struck.map_or(("-", "-"), |(moment, fault)| (moment.name(), fault.name()));
        println!(
            "{n:>3}  h{from} > h{to}  {:<10} {:<26} {:<7} {:<8} {:>14} {:>4} {:>5} {:>4}  {:>16} {:>5}",
            name.0,
            name.1,
            scene::exit(&ended),
            runs_on.join("+"),
            counted["sent"],
            counted["lost"],
            counted["duplicated"],
            counted["reordered"],
            last.memory_kib,
            last.files,
        );
        for line in &wrong {
            println!("     {line}");
        }
        rows.push(json!({
            "n": n, "from": format!("h{from}"), "to": format!("h{to}"), "moment": name.0, "fault": name.1,
            "exit": scene::exit(&ended), "runs_on": runs_on, "udp": counted, "wrong": wrong,
            "agent_memory_kib": last.memory_kib, "agent_files": last.files,
        }));
        if !wrong.is_empty() {
            bad.push(n);
        }
        if runs_on.len() != 1 {
            break;
        }
    }
    let report = tcp.stop().await;
    udp.stop().await;
    let first = first.unwrap_or(last);
    let connection = scene::connection(&report);
    println!(
        "\nTCP: the connection {connection}: {} requests, {} unanswered, {} wrong, longest gap {:.0} ms\n\
         agent of h1: {} KiB and {} files after {} migrations, {} KiB and {} files after {n}",
        report["requests"],
        report["unanswered"],
        report["wrong"],
        report["longest_gap_ms"].as_f64().unwrap_or(f64::NAN),
        first.memory_kib,
        first.files,
        runs.div_ceil(WARM),
        last.memory_kib,
        last.files,
    );
    let flat =
        last.memory_kib <= first.memory_kib + MORE_MEMORY && last.files <= first.files + MORE_FILES;
    println!(
        "UDP: {} of {} datagrams lost where nothing was broken",
        spared[0], spared[1]
    );
    let kept = spared[0] <= spared[1] / LOST_AT_MOST;
    let passed = bad.is_empty() && flat && kept && connection == "went on";
    write(&json!({
        "engine": engine, "seed": seed, "migrations": n, "tcp": report, "rows": rows, "passed": passed,
        "udp_where_nothing_was_broken": { "lost": spared[0], "sent": spared[1] },
        "agent_first": { "memory_kib": first.memory_kib, "files": first.files },
        "agent_last": { "memory_kib": last.memory_kib, "files": last.files },
    }));
    scene.end().await;
    if passed {
        println!(
            "PASS: nothing was lost that may not be, nothing is left, the agent has not grown"
        );
        ExitCode::SUCCESS
    } else {
        println!("FAIL: seed {seed}; migrations {bad:?}; flat: {flat}");
        ExitCode::FAILURE
    }
}

/// Ends the datagrams' run, and returns what became of them.
async fn next(udp: &Process, n: u64) -> Value {
    udp.signal(Signal::USR1);
    let began = Instant::now();
    loop {
        let said = udp.stdout();
        if let Some(line) = said
            .lines()
            .nth(usize::try_from(n - 1).unwrap_or(usize::MAX))
            && let Ok(counted) = serde_json::from_str(line)
        {
            return counted;
        }
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "no count of datagrams: {said}"
        );
        tokio::time::sleep(LOOK).await;
    }
}

fn write(content: &Value) {
    let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/target/faults"));
    let path = directory.join("soak.json");
    std::fs::create_dir_all(directory)
        .and_then(|()| std::fs::write(&path, format!("{content:#}\n")))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    println!("all of it: target/faults/soak.json");
}
