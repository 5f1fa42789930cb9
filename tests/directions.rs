//! Connections go on whichever way they go: from wherever a peer is, through whatever port.

mod lab;

use lab::Node;
use lab::pair::Pair;
use serde_json::Value;

/// Panics unless all the connections of an echo client went on, with nothing wrong.
#[track_caller]
fn assert_went_on(report: &Value, connections: u64) {
    assert_eq!(report["connected"], connections, "{report}");
    assert_eq!(report["wrong"], 0, "{report}");
    assert_eq!(report["resets"], 0, "{report}");
    assert_eq!(report["unanswered"], 0, "{report}");
    assert_eq!(report["same_socket"], true, "{report}");
}

/// Panics unless a datagram client that was never told of anything lost nothing.
#[track_caller]
fn assert_nothing_lost(report: &Value) {
    assert_eq!(report["lost"], 0, "{report}");
    assert_eq!(report["duplicated"], 0, "{report}");
}

/// An echo client in a container of its own.
struct ClientContainer {
    host: Node,
    name: &'static str,
}

impl ClientContainer {
    async fn start(
        host: &Node,
        name: &'static str,
        podman: &[&str],
        workload: &[&str],
    ) -> ClientContainer {
        host.run_workload(name, podman, workload).await;
        let ready = format!("until podman logs {name} 2>&1 | grep -q ready; do sleep 0.1; done");
        host.sh(&ready).await;
        let host = host.clone();
        ClientContainer { host, name }
    }

    async fn stop(self) -> Value {
        self.host.exec(&["podman", "stop", self.name]).await;
        let logs = self
            .host
            .sh(&format!("podman logs {} 2>/dev/null", self.name));
        let report = logs.await.json();
        self.host.exec(&["podman", "rm", self.name]).await;
        report
    }
}

/// Programs on the source, by every address that they can use; containers there, on the same network
/// and on another; a program on the destination.
#[tokio::test]
async fn clients_on_the_hosts_themselves_go_on() {
    let pair = Pair::up().await;
    let (h1, h2, c1) = (pair.host(1), pair.host(2), pair.client(1));
    let ip = h1.ip();
    h1.run_workload("web", &["-p", "8080:7000"], &["echo", "7000"])
        .await;
    h1.exec(&["podman", "network", "create", "second"]).await;

    let outside = c1.spawn(&["client-echo", &ip, "8080"]).await;
    let loopback = h1
        .spawn(&["client-echo", "127.0.0.1", "8080", "--idle", "1"])
        .await;
    let own_address = h1.spawn(&["client-echo", &ip, "8080"]).await;
    let at_destination = h2.spawn(&["client-echo", &ip, "8080"]).await;
    let client = ["client-echo", &ip, "8080"];
    let neighbour = ClientContainer::start(h1, "neighbour", &[], &client).await;
    let second = ["--network", "second"];
    let next_door = ClientContainer::start(h1, "nextdoor", &second, &client).await;

    let report = pair.migrate("web", 1, 2).await;
    pair.assert_moved("web", 1, 2, &report).await;
    assert_eq!(
        report["flows"].as_array().map(Vec::len),
        Some(7),
        "{report}"
    );
    assert_eq!(report["warnings"], serde_json::json!([]), "{report}");

    // The same with datagrams, none of which is sent again.
    h1.run_workload("dgram", &["-p", "8081:7000/udp"], &["udp-echo", "7000"])
        .await;
    let udp = ["client-udp", &ip, "8081", "--rate", "100"];
    let from_loopback = ["client-udp", "127.0.0.1", "8081", "--rate", "100"];
    let datagrams = [
        ("loopback", h1.spawn(&from_loopback).await),
        ("own address", h1.spawn(&udp).await),
        ("at the destination", h2.spawn(&udp).await),
        ("outside", c1.spawn(&udp).await),
    ];
    let asking = ClientContainer::start(h1, "asking", &[], &udp).await;
    let report = pair.migrate("dgram", 1, 2).await;
    pair.assert_moved("dgram", 1, 2, &report).await;
    println!("{}", report["held"]);
    for (whose, client) in datagrams {
        println!("{whose}");
        assert_nothing_lost(&client.stop().await);
    }
    assert_nothing_lost(&asking.stop().await);

    println!("outside");
    assert_went_on(&outside.stop().await, 1);
    println!("loopback");
    assert_went_on(&loopback.stop().await, 2);
    println!("own address");
    assert_went_on(&own_address.stop().await, 1);
    println!("neighbour");
    assert_went_on(&neighbour.stop().await, 1);
    println!("next door");
    assert_went_on(&next_door.stop().await, 1);
    println!("at the destination");
    assert_went_on(&at_destination.stop().await, 1);
    pair.down().await;
}

/// A range of ports; one that is bound to one address of the host; a container on two networks; what
/// the container opened, by TCP and by UDP, with an answer on its way and with an error.
#[tokio::test]
async fn every_kind_of_port_and_what_the_container_opened_goes_on() {
    let pair = Pair::up().await;
    let (h1, h2, c1) = (pair.host(1), pair.host(2), pair.client(1));
    let ip = h1.ip();
    h1.exec(&["podman", "network", "create", "second"]).await;
    // The same on both, so that it can be published there too.
    h2.sh("ip address add 10.77.0.200/32 dev lo").await;
    h1.sh("ip address add 10.77.0.200/32 dev lo").await;
    c1.sh(&format!("ip route add 10.77.0.200/32 via {ip}"))
        .await;
    let servers = [
        c1.spawn_command(&["workload", "echo", "7100"]),
        c1.spawn_command(&["workload", "udp-echo", "7101"]),
    ];
    let ends = c1.spawn_command(&["workload", "udp-echo", "7102"]);
    let client = c1.ip();
    let tcp = ["dial", &client, "7100", "--control", "7001"];
    let ports = [
        "--network",
        "podman,second",
        "-p",
        "9000-9009:7000-7009",
        "-p",
        "10.77.0.200:8000:7001",
    ];
    h1.run_workload("web", &ports, &tcp).await;
    let query = ["client-udp", &client, "7101", "--rate", "200"];
    let asking = ClientContainer::start(h1, "asking", &[], &query).await;

    let query = ["client-udp", &client, "7102", "--rate", "200"];
    let erring = ClientContainer::start(h1, "erring", &[], &query).await;

    // The control port by the range, and by the one address.
    let by_range = c1.spawn(&["client-echo", &ip, "9001"]).await;
    let by_address = c1.spawn(&["client-echo", "10.77.0.200", "8000"]).await;
    // A connection that does not pass the host at all. It cannot be kept, and that is said before.
    let address = h1
        .exec(&[
            "podman",
            "inspect",
            "-f",
            "{{.NetworkSettings.Networks.podman.IPAddress}}",
            "web",
        ])
        .await;
    let direct = ["client-echo", address.text(), "7001", "--idle", "1"];
    let direct = ClientContainer::start(h1, "direct", &[], &direct).await;
    let check = h1
        .exec(&["livemig", "--json", "check", "web", "--to", "h2"])
        .await
        .json();
    let findings = check["findings"].as_array().expect("a list");
    let named = findings.iter().filter(|finding| {
        let what = finding["what"].as_str().expect("text");
        what.contains("will break") && what.contains(&format!("{}:7001", address.text()))
    });
    assert_eq!(named.count(), 2, "{check}");
    h1.exec(&["podman", "rm", "-f", "-t", "0", direct.name])
        .await;

    let report = pair.migrate("web", 1, 2).await;
    pair.assert_moved("web", 1, 2, &report).await;
    let moved = pair.migrate("asking", 1, 2).await;
    pair.assert_moved("asking", 1, 2, &moved).await;
    let moved = pair.migrate("erring", 1, 2).await;
    pair.assert_moved("erring", 1, 2, &moved).await;

    assert_went_on(&by_range.stop().await, 1);
    assert_went_on(&by_address.stop().await, 1);
    let ask = async |what: &str| c1.ask(h2.address(), 9001, what).await;
    let first = ask("report").await;
    let replies = |report: &Value| report["replies"].as_u64().expect("a number");
    until("its own connection goes on", async || {
        replies(&ask("report").await) > replies(&first)
    })
    .await;
    let asking = ClientContainer {
        host: h2.clone(),
        ..asking
    };
    assert_nothing_lost(&asking.stop().await);
    // What it sends to a port that nobody has any more comes back as an ICMP error.
    ends.kill().await;
    let erring = ClientContainer {
        host: h2.clone(),
        ..erring
    };
    let erred = erring.stop().await;
    assert!(erred["refused"].as_u64() > Some(0), "{erred}");
    drop(servers);
    pair.down().await;
}

/// Looks again and again until it is so, and panics when it does not become so.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    for _ in 0..200 {
        if is_so().await {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("waited in vain: {what}");
}

/// Panics unless a connection to this port is refused at once.
async fn assert_refused(from: &Node, address: &str, port: &str) {
    let output = from
        .try_exec(&["workload", "ask", address, port, "info"])
        .await;
    assert!(!output.status.success(), "{output}");
    assert!(output.stderr.contains("refused"), "{output}");
}

#[tokio::test]
async fn new_connections_are_refused_and_the_port_is_free_for_another_container() {
    let pair = Pair::up().await;
    let (h1, c1) = (pair.host(1), pair.client(1));
    let ip = h1.ip();
    let publish = ["-p", "8080:7000"];
    h1.run_workload("web", &publish, &["echo", "7000"]).await;
    let old = c1.spawn(&["client-echo", &ip, "8080"]).await;
    // Whoever knocks at any moment is either let in or refused; nobody is left to wait.
    let knocking = c1.spawn_command(&[
        "sh",
        "-c",
        &format!(
            "while [ ! -e /tmp/enough-{0} ]; do workload ask {ip} 8080 info 2>&1; done | sort | uniq -c",
            std::process::id()
        ),
    ]);
    let report = pair.migrate("web", 1, 2).await;
    pair.assert_moved("web", 1, 2, &report).await;
    c1.sh(&format!("touch /tmp/enough-{}", std::process::id()))
        .await;
    let knocked = knocking.finish().await;
    c1.sh(&format!("rm /tmp/enough-{}", std::process::id()))
        .await;
    println!("{knocked}");
    for line in knocked.stdout.lines() {
        let fine = ["refused", "\"pid\"", "reset"];
        assert!(fine.iter().any(|fine| line.contains(fine)), "{knocked}");
    }
    assert_refused(c1, &ip, "8080").await;
    assert_refused(h1, "127.0.0.1", "8080").await;

    h1.run_workload("new", &publish, &["echo", "7000"]).await;
    let new = c1.spawn(&["client-echo", &ip, "8080"]).await;
    let local = h1.spawn(&["client-echo", "127.0.0.1", "8080"]).await;
    assert_went_on(&old.stop().await, 1);
    assert_went_on(&new.stop().await, 1);
    assert_went_on(&local.stop().await, 1);
    pair.down().await;
}

#[tokio::test]
async fn new_connections_are_carried_after_the_container_until_that_is_stopped() {
    let mut pair = Pair::of(lab::Lab::builder(3)).await;
    let ip = pair.host(1).ip();
    let client = ["client-echo", &ip, "8080"];
    let publish = ["-p", "8080:7000", "-p", "8090-8092:7000-7002"];
    pair.host(1)
        .run_workload("web", &publish, &["echo", "7000"])
        .await;
    pair.host(1)
        .run_workload("dgram", &["-p", "8080:7000/udp"], &["udp-echo", "7000"])
        .await;
    for name in ["web", "dgram"] {
        let moved = pair.try_migrate(name, 1, 2, &["--forward-new"]).await;
        assert!(moved.status.success(), "{moved}");
    }
    // From everywhere.
    let mut open = Vec::new();
    for (whose, node, address) in [
        ("client", pair.client(1), ip.as_str()),
        ("program on the old host", pair.host(1), "127.0.0.1"),
        ("the same by its address", pair.host(1), &ip),
        ("program on the new host", pair.host(2), &ip),
        ("program on another host", pair.host(3), &ip),
    ] {
        println!("{whose}");
        open.push((whose, node.spawn(&["client-echo", address, "8080"]).await));
        open.push((whose, node.spawn(&["client-echo", address, "8090"]).await));
        let count = [
            "client-udp",
            address,
            "8080",
            "--rate",
            "100",
            "--seconds",
            "1",
        ];
        let counted = node.run(&count).await;
        assert_eq!(counted["lost"], 0, "{whose}: {counted}");
    }
    let neighbour = ClientContainer::start(pair.host(1), "neighbour", &[], &client).await;

    // A further move, which nobody asked to forward: what came so far comes on.
    let report = pair.migrate("web", 2, 3).await;
    pair.assert_moved("web", 2, 3, &report).await;
    assert_refused(pair.client(1), &pair.host(2).ip(), "8080").await;
    for host in 1..=3 {
        pair.replace_agent(host).await;
    }
    let late = pair.client(1).spawn(&client).await;
    let late_local = pair
        .host(1)
        .spawn(&["client-echo", "127.0.0.1", "8080"])
        .await;

    let stop = ["livemig", "flows", "--stop-forwarding", "web"];
    pair.host(1).exec(&stop).await;
    let again = pair.host(1).try_exec(&stop).await;
    assert!(!again.status.success(), "{again}");
    assert_refused(pair.client(1), &ip, "8080").await;
    assert_refused(pair.host(1), "127.0.0.1", "8080").await;
    pair.host(1)
        .exec(&["livemig", "flows", "--stop-forwarding"])
        .await;
    for host in [1, 2, 3] {
        let left = pair
            .host(host)
            .sh("ls /run/livemig/forwards 2>/dev/null || true");
        assert_eq!(left.await.text(), "", "on h{host}");
        let rules = pair
            .host(host)
            .sh("nft list table inet livemig | grep 'jump forward_' || true");
        assert_eq!(rules.await.text(), "", "on h{host}");
    }
    // What was open goes on.
    for (whose, client) in open {
        println!("{whose}");
        assert_went_on(&client.stop().await, 1);
    }
    assert_went_on(&late.stop().await, 1);
    assert_went_on(&late_local.stop().await, 1);
    assert_went_on(&neighbour.stop().await, 1);
    pair.down().await;
}

/// Everything of this is undone when the container stays: the connections of programs here, which
/// were made over again, go on, and a new one reaches it as before.
#[tokio::test]
async fn a_rehearsal_changes_nothing_for_local_programs_and_new_connections() {
    let pair = Pair::up().await;
    let (h1, h2) = (pair.host(1), pair.host(2));
    h1.run_workload("web", &["-p", "8080:7000"], &["echo", "7000"])
        .await;
    let loopback = ["client-echo", "127.0.0.1", "8080"];
    let old = h1.spawn(&loopback).await;
    let rehearsal = ["--forward-new", "--rehearse", "restore"];
    let rehearsed = pair.try_migrate("web", 1, 2, &rehearsal).await;
    assert!(rehearsed.status.success(), "{rehearsed}");
    assert_eq!(
        h1.container_state("web").await.as_deref(),
        Some("running"),
        "{rehearsed}"
    );
    let new = h1.spawn(&loopback).await;
    assert_went_on(&old.stop().await, 1);
    assert_went_on(&new.stop().await, 1);
    for host in [h1, h2] {
        let left = host.sh("ls /run/livemig/forwards 2>/dev/null; nft list tables; ls /run/livemig/hops/*.json 2>/dev/null || true");
        let left = left.await;
        assert!(!left.text().contains("livemig"), "{left}");
        assert!(!left.text().contains(".json"), "{left}");
    }
    pair.down().await;
}

#[tokio::test]
async fn when_the_container_comes_home_new_connections_stay_there() {
    let pair = Pair::up().await;
    let (h1, h2, c1) = (pair.host(1), pair.host(2), pair.client(1));
    let ip = h1.ip();
    h1.run_workload("web", &["-p", "8080:7000"], &["echo", "7000"])
        .await;
    let (client, local) = (
        ["client-echo", ip.as_str(), "8080"],
        ["client-echo", "127.0.0.1", "8080"],
    );
    let first = [c1.spawn(&client).await, h1.spawn(&local).await];
    let moved = pair.try_migrate("web", 1, 2, &["--forward-new"]).await;
    assert!(moved.status.success(), "{moved}");
    let carried = [c1.spawn(&client).await, h1.spawn(&local).await];
    let report = pair.migrate("web", 2, 1).await;
    pair.assert_moved("web", 2, 1, &report).await;
    let home = [c1.spawn(&client).await, h1.spawn(&local).await];
    for client in first.into_iter().chain(carried).chain(home) {
        assert_went_on(&client.stop().await, 1);
    }
    for host in [h1, h2] {
        let left = host
            .sh("ls /run/livemig/forwards 2>/dev/null || true")
            .await;
        assert_eq!(left.text(), "", "{left}");
    }
    pair.down().await;
}
