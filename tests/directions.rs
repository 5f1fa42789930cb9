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
struct ClientContainer<'a> {
    host: &'a Node,
    name: &'static str,
}

impl<'a> ClientContainer<'a> {
    async fn start(
        host: &'a Node,
        name: &'static str,
        podman: &[&str],
        workload: &[&str],
    ) -> ClientContainer<'a> {
        host.run_workload(name, podman, workload).await;
        let ready = format!("until podman logs {name} 2>&1 | grep -q ready; do sleep 0.1; done");
        host.sh(&ready).await;
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
    let udp = ["client-udp", &ip, "8081", "--rate", "500"];
    let from_loopback = ["client-udp", "127.0.0.1", "8081", "--rate", "500"];
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
