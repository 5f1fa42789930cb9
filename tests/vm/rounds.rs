//! Rounds of memory, for which the container stands still a moment: how long, and what becomes of it when
//! something goes wrong in just that moment.

use serde_json::Value;

use super::lab::{IMAGE, Lab, Node, Workload};
use super::{Clock, PORT};

const ROUNDS: usize = 4;
/// So many that CRIU's first look comes too early in some of them.
const BY_HAND: usize = 8;
/// What goes on in the container beside the workload: with one processor that they share, CRIU's first look at the
/// cgroup comes too early for them. (With two it comes too early for an idle one.)
const BUSY: &str = "for i in 1 2 3; do while :; do :; done & done; exec /workload touch 64 1 7000";
/// Where the container's processes are frozen.
const CGROUP: &str =
    "CGROUP=/sys/fs/cgroup/machine.slice/libpod-$(podman inspect -f '{{.Id}}' web).scope";

/// CRIU looks in steps of 100 ms whether the processes of a container that it stops have stopped. In livemig's
/// rounds it finds them stopped.
pub async fn stand_still_only_for_criu(clock: &Clock, lab: &Lab) {
    println!("\n== rounds of memory, and how long the container stands still");
    let a = lab.host(1);
    let entry = ["--entrypoint", "/bin/sh", IMAGE, "-c", BUSY];
    start(clock, a, &entry).await;

    clock.step(
        "a",
        "runc checkpoint --pre-dump, which is what a round would be",
    );
    let client = client(lab).await;
    let by_hand = a
        .sh(&format!(
            r#"cd /dev/shm; mkdir by-hand; cd by-hand; id=$(podman inspect -f '{{{{.Id}}}}' web)
            for round in $(seq {BY_HAND}); do
                runc checkpoint --pre-dump --tcp-established --image-path $PWD/$round \
                    --work-path $PWD/work-$round $parent $id
                parent="--parent-path ../$round"
            done
            cat work-*/dump.log; cd ..; rm -r by-hand"#
        ))
        .await;
    let theirs = client.stop().await;
    clock.show(&format!(
        "CRIU waits for the processes {} times; the client's longest gap is {} ms",
        polls(&by_hand.stdout),
        theirs["longest_gap_ms"]
    ));
    assert_eq!(looks(&by_hand.stdout, "freezing processes: "), BY_HAND);

    clock.step("a", "livemig migrate web --rehearse precopy");
    let client = self::client(lab).await;
    // The logs go when it is undone.
    let output = a
        .sh(&format!(
            r#"mkdir /root/logs
            while [ -d /root/logs ]; do cp -r /dev/shm/livemig-*/work-* /root/logs 2>/dev/null || true; sleep 0.1; done &
            livemig migrate web --to host-b --engine direct --rounds {ROUNDS} --rehearse precopy --json
            cat /root/logs/work-*/dump.log; rm -r /root/logs; wait"#
        ))
        .await;
    let ours = client.stop().await;
    let rounds = copied(&output.stdout);
    let stood: Vec<f64> = rounds
        .iter()
        .filter_map(|round| round["frozen_ms"].as_f64())
        .collect();
    clock.show(&format!(
        "CRIU waits for the processes {} times; they stood still for {stood:?} ms; the client's longest gap is {} ms",
        polls(&output.stdout),
        ours["longest_gap_ms"]
    ));
    assert_eq!(stood.len(), rounds.len(), "{rounds:?}");
    assert!(rounds.len() >= 2, "{rounds:?}");
    // It has found them frozen, each time.
    assert_eq!(looks(&output.stdout, "freezing processes: "), 0, "{output}");
    assert!(
        looks(&output.stdout, "cgroup.freeze=1") >= rounds.len(),
        "{output}"
    );
    // What the client sees is shown, and not judged: emulated, starting CRIU, for which the container stands still
    // as well, takes some 60 ms, and on a real processor 2 to 3; but CRIU waits by the clock.
    let a_round = |logs: &str, rounds: usize| until_seized(logs) / rounds as f64;
    let ours_waits = a_round(&output.stdout, rounds.len());
    let theirs_waits = a_round(&by_hand.stdout, BY_HAND);
    clock.show(&format!(
        "from CRIU's look at the cgroup until it has the first process, in a round: {ours_waits:.3} s, by hand {theirs_waits:.3} s"
    ));
    assert!(
        ours_waits < theirs_waits / 2.0,
        "{output}\nand by hand\n{by_hand}"
    );
    for seen in [&ours, &theirs] {
        assert_eq!((&seen["wrong"], &seen["resets"]), (&0.into(), &0.into()));
    }
    a.exec(&["podman", "rm", "--force", "--time", "0", "web"])
        .await;
}

/// While the container stands still for a round, livemig is killed, or told to end, or loses its destination:
/// the container goes on at once, without anybody's help.
pub async fn struck_in_the_midst(clock: &Clock, lab: &Lab) {
    println!("\n== struck in the midst of a round");
    let (a, b) = (lab.host(1), lab.host(2));
    start(clock, a, &[IMAGE, "touch", "64", "1", PORT]).await;
    let client = client(lab).await;
    for (what, strike) in [
        ("kill -9", "kill -KILL $livemig"),
        ("Ctrl-C", "kill -INT $livemig"),
        // The connection over which the memory goes.
        ("its connections are cut", "ss -K dst 10.77.0.52"),
    ] {
        clock.step("a", what);
        let output = a
            .sh(&format!(
                r#"{CGROUP}
                livemig migrate web --to host-b --engine direct --json >/tmp/out 2>&1 & livemig=$!
                while read frozen <$CGROUP/cgroup.freeze && [ $frozen = 0 ]; do :; done
                {strike} >/dev/null || true
                echo struck $frozen
                ended=0; wait $livemig || ended=$?
                [ $ended != 0 ] || cat /tmp/out
                # CRIU, and whoever is to thaw it then, which is a program of that name as well.
                while pgrep criu >/dev/null; do sleep 0.02; done
                echo ended $ended, $(cat $CGROUP/cgroup.freeze), $(tail -n 1 $CGROUP/cgroup.events)
                livemig recover --json
                echo left: $(ls -d /dev/shm/livemig-* 2>/dev/null)"#
            ))
            .await;
        let said = &output.stdout;
        let line = |start: &str| {
            let mut lines = said.lines();
            lines.find(|line| line.starts_with(start)).unwrap_or("")
        };
        clock.show(line("ended"));
        assert_eq!(line("struck"), "struck 1", "{what}: {output}");
        assert!(!line("ended").starts_with("ended 0"), "{what}: {output}");
        assert!(line("ended").ends_with(", 0, frozen 0"), "{what}: {output}");
        assert_eq!(line("left:").trim(), "left:", "{what}: {output}");
        assert_eq!(a.container_state("web").await.as_deref(), Some("running"));
        // The other host tidies up by itself where nobody tells it to.
        b.sh("systemctl restart livemig-agent").await;
    }
    let seen = client.stop().await;
    clock.show(&format!(
        "{} requests, {} replies, {} wrong, {} resets",
        seen["requests"], seen["replies"], seen["wrong"], seen["resets"]
    ));
    for nothing in ["wrong", "resets", "unanswered"] {
        assert_eq!(seen[nothing], 0, "{seen:#}");
    }
    let pages = lab.client(1).ask(a.address(), 7000, "memory").await;
    assert_eq!(
        (&pages["wrong"], &pages["stale"]),
        (&0.into(), &0.into()),
        "{pages}"
    );
    a.exec(&["podman", "rm", "--force", "--time", "0", "web"])
        .await;
}

async fn start(clock: &Clock, a: &Node, entry: &[&str]) {
    clock.step("a", &format!("podman run {}", entry.join(" ")));
    let publish = format!("{PORT}:{PORT}");
    let run = ["podman", "run", "-d", "--name", "web", "-p", &publish];
    a.exec(&[&run[..], entry].concat()).await;
}

async fn client(lab: &Lab) -> Workload {
    let (a, grace) = (lab.host(1).ip(), ["--grace-ms", "60000"]);
    let ask = ["client-echo", &a, PORT, "--every-ms", "10"];
    lab.client(1).spawn(&[&ask[..], &grace].concat()).await
}

/// What livemig says of each round.
fn copied(lines: &str) -> Vec<Value> {
    let events = lines
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    events.filter(|event| event["event"] == "copied").collect()
}

/// In how many lines of CRIU's logs this is.
fn looks(logs: &str, what: &str) -> usize {
    logs.lines().filter(|line| line.contains(what)).count()
}

/// How often it has waited 100 ms.
fn polls(logs: &str) -> usize {
    let waits = logs
        .lines()
        .filter_map(|line| line.split_once("freezing processes: "));
    waits
        .filter_map(|(_, rest)| rest.split(' ').next()?.parse::<usize>().ok())
        .sum()
}

/// For how many seconds CRIU has waited, by its logs, all of them one after the other, until the processes stood still.
fn until_seized(logs: &str) -> f64 {
    let time = |line: &str| -> Option<f64> {
        let (seconds, _) = line.split_once('(')?.1.split_once(')')?;
        seconds.parse().ok()
    };
    let (mut total, mut since) = (0.0, None);
    for line in logs.lines() {
        if line.contains("freezing cgroup") {
            since = time(line);
        } else if line.contains("Seized task")
            && let (Some(begun), Some(now)) = (since.take(), time(line))
        {
            total += now - begun;
        }
    }
    total
}
