//! Connections go on from another host: the point of it all.

mod lab;

use lab::pair::{Pair, assert_went_on};
use lab::{Builder, Census, Lab};
use serde_json::Value;

/// Hosts on which a container is about to start, and how the first of them was before.
struct Stage {
    pair: Pair,
    before: Census,
}

impl Stage {
    /// `podman` are the container's arguments for `podman run`, `workload` what runs in it, as `web`.
    async fn new(lab: Builder, podman: &[&str], workload: &[&str]) -> Stage {
        Stage::on(Pair::of(lab).await, podman, workload).await
    }

    /// The same on hosts that are up.
    async fn on(pair: Pair, podman: &[&str], workload: &[&str]) -> Stage {
        let before = pair.settled(1, podman).await;
        pair.host(1).run_workload("web", podman, workload).await;
        Stage { pair, before }
    }

    /// Moves it from the first host to the second with this many connections, and looks whether that
    /// is what happened.
    async fn move_it(&self, flows: usize) -> Value {
        let report = self.pair.migrate("web", 1, 2).await;
        self.look(flows, &report).await;
        report
    }

    async fn look(&self, flows: usize, report: &Value) {
        self.pair.assert_moved("web", 1, 2, report).await;
        let kept = report["flows"].as_array().map(Vec::len);
        assert_eq!(kept, Some(flows), "{report}");
        self.pair
            .assert_only_the_hop_is_left(1, &self.before, flows)
            .await;
    }
}

/// A busy connection, and one that is silent from before the move until after it.
async fn busy_and_idle(runtime: &str) {
    let lab = Lab::builder(2).runtime(runtime);
    let stage = Stage::new(lab, &["-p", "7000:7000"], &["echo", "7000"]).await;
    let (h1, c1) = (stage.pair.host(1), stage.pair.client(1));
    let client = c1
        .spawn(&["client-echo", &h1.ip(), "7000", "--idle", "1"])
        .await;
    stage.move_it(2).await;
    // Only now does the idle one speak again.
    assert_went_on(&client.stop().await, 2);
    stage.pair.down().await;
}

#[tokio::test]
async fn a_busy_and_an_idle_one_go_on_under_runc() {
    busy_and_idle("runc").await;
}

#[tokio::test]
async fn a_busy_and_an_idle_one_go_on_under_crun() {
    busy_and_idle("crun").await;
}

#[tokio::test]
async fn two_hundred_at_once_go_on() {
    let stage = Stage::new(Lab::builder(2), &["-p", "7000:7000"], &["echo", "7000"]).await;
    let (h1, c1) = (stage.pair.host(1), stage.pair.client(1));
    let ip = h1.ip();
    let many = ["--connections", "200", "--every-ms", "20"];
    let client = c1
        .spawn(&[&["client-echo", &ip, "7000"][..], &many].concat())
        .await;
    stage.move_it(200).await;
    assert_went_on(&client.stop().await, 200);
    stage.pair.down().await;
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard() {
    // Where a packet of a connection that nobody introduced would be dropped.
    let lab = Lab::builder(2).firewall();
    let ports = ["-p", "7000:7000", "-p", "7001:7001"];
    let stage = Stage::new(lab, &ports, &["greet", "7000", "--control", "7001"]).await;
    let (h1, h2, c1) = (stage.pair.host(1), stage.pair.host(2), stage.pair.client(1));
    h2.sh("echo 0 >/proc/sys/net/netfilter/nf_conntrack_tcp_loose")
        .await;
    let client = c1.spawn(&["client-greet", &h1.ip(), "7000", "--lines", "1"]);
    let client = client.await;
    stage.move_it(1).await;
    c1.ask(h2.address(), 7001, "say").await;
    let heard = client.finish().await;
    assert_eq!(heard["lines"], 1, "{heard}");
    assert_eq!(heard["wrong"], 0, "{heard}");
    assert_eq!(heard["resets"], 0, "{heard}");
    stage.pair.down().await;
}

/// Much data in both directions, the move in the middle of it.
async fn bulk(stage: Stage, mib: &str) {
    let (h1, c1) = (stage.pair.host(1), stage.pair.client(1));
    let ip = h1.ip();
    // Slow enough to last longer than the move: as fast as it goes, it would be over before.
    let amount = ["--mib", mib, "--rate-mib", "8"];
    let mut client = c1
        .spawn(&[&["client-bulk", &ip, "7000"][..], &amount].concat())
        .await;
    let moved = stage.pair.migrate("web", 1, 2).await;
    assert!(client.is_running(), "the data was too little for this test");
    stage.look(1, &moved).await;
    let report = client.finish().await;
    assert_eq!(report["failure"], Value::Null, "{report}");
    assert_eq!(report["sent"], report["bytes_each_way"], "{report}");
    assert_eq!(report["received"], report["bytes_each_way"], "{report}");
    assert_eq!(report["sent_right"], true, "{report}");
    assert_eq!(report["received_right"], true, "{report}");
    stage.pair.down().await;
}

#[tokio::test]
async fn bulk_data_in_both_directions_arrives_whole() {
    let stage = Stage::new(Lab::builder(2), &["-p", "7000:7000"], &["bulk", "7000"]).await;
    bulk(stage, "64").await;
}

#[tokio::test]
async fn full_size_segments_go_on_where_icmp_is_filtered() {
    let pair = Pair::up().await;
    let filter = "nft 'add table inet filtered
        add chain inet filtered in { type filter hook prerouting priority -400; }
        add chain inet filtered out { type filter hook output priority -400; }
        add rule inet filtered in meta l4proto icmp drop
        add rule inet filtered out meta l4proto icmp drop'";
    for node in [pair.host(1), pair.host(2), pair.client(1)] {
        node.sh(filter).await;
    }
    let stage = Stage::on(pair, &["-p", "7000:7000"], &["bulk", "7000"]).await;
    bulk(stage, "48").await;
}

#[tokio::test]
async fn a_connection_that_the_container_opened_goes_on() {
    let pair = Pair::up().await;
    let ip = pair.client(1).ip();
    let server = pair.client(1).spawn_command(&["workload", "echo", "7000"]);
    let dial = ["dial", &ip, "7000", "--control", "7001"];
    let stage = Stage::on(pair, &["-p", "7001:7001"], &dial).await;
    let (h1, h2, c1) = (stage.pair.host(1), stage.pair.host(2), stage.pair.client(1));
    // A connection of the container's, and the one over which it is asked, which is over.
    let earlier = c1.ask(h1.address(), 7001, "report").await;
    stage.move_it(1).await;
    c1.ask(h2.address(), 7001, "stop").await;
    let report = async || c1.ask(h2.address(), 7001, "report").await;
    let mut later = report().await;
    for _ in 0..100 {
        if later["unanswered"] == 0 {
            break;
        }
        later = report().await;
    }
    assert_went_on(&later, 1);
    assert_eq!(later["local"], earlier["local"], "{later}");
    let replies = |report: &Value| report["replies"].as_u64().expect("a number");
    assert!(replies(&later) > replies(&earlier), "{later}, {earlier}");
    drop(server);
    stage.pair.down().await;
}

#[tokio::test]
async fn clients_of_both_families_go_on() {
    let pair = Pair::up().await;
    pair.host(1)
        .exec(&["podman", "network", "create", "--ipv6", "dual"])
        .await;
    let podman = ["--network", "dual", "-p", "7000:7000"];
    let stage = Stage::on(pair, &podman, &["echo", "7000", "--host", "v6"]).await;
    let (h1, c1) = (stage.pair.host(1), stage.pair.client(1));
    let (four, six) = (h1.ip(), h1.address6().to_string());
    let over4 = c1.spawn(&["client-echo", &four, "7000"]).await;
    let over6 = c1.spawn(&["client-echo", &six, "7000"]).await;
    stage.move_it(2).await;
    assert_went_on(&over6.stop().await, 1);
    assert_went_on(&over4.stop().await, 1);
    stage.pair.down().await;
}

#[tokio::test]
async fn datagrams_go_on_in_both_directions() {
    let stage = Stage::new(
        Lab::builder(2),
        &["-p", "7000:7000/udp"],
        &["udp-echo", "7000"],
    )
    .await;
    let (h1, c1) = (stage.pair.host(1), stage.pair.client(1));
    let client = c1
        .spawn(&["client-udp", &h1.ip(), "7000", "--rate", "1000"])
        .await;
    let report = stage.move_it(1).await;
    let client = client.stop().await;
    println!(
        "lost {} of {}, {} held",
        client["lost"], client["sent"], report["held"]
    );
    let number = |name: &str| client[name].as_u64().expect("a number");
    // The last one came back, from where the container is now. That none at all is lost is not
    // promised yet; most must not be.
    assert_eq!(number("highest") + 1, number("sent"), "{client}");
    assert_eq!(number("duplicated"), 0, "{client}");
    assert!(number("lost") < number("sent") / 2, "{client}");
    stage.pair.down().await;
}

#[tokio::test]
async fn a_connection_goes_on_from_a_third_host() {
    let lab = Lab::builder(3);
    let stage = Stage::new(lab, &["-p", "7000:7000"], &["echo", "7000"]).await;
    let (pair, ip) = (&stage.pair, stage.pair.host(1).ip());
    let client = pair
        .client(1)
        .spawn(&["client-echo", &ip, "7000", "--idle", "1"])
        .await;
    stage.move_it(2).await;
    let report = pair.migrate("web", 2, 3).await;
    pair.assert_moved("web", 2, 3, &report).await;
    assert_eq!(
        report["flows"].as_array().map(Vec::len),
        Some(2),
        "{report}"
    );
    assert_went_on(&client.stop().await, 2);
    stage.pair.down().await;
}

#[tokio::test]
async fn a_hop_goes_when_its_last_connection_has_gone() {
    let stage = Stage::new(Lab::builder(2), &["-p", "7000:7000"], &["echo", "7000"]).await;
    let (pair, c1) = (&stage.pair, stage.pair.client(1));
    for host in [1, 2] {
        // The kernel remembers a connection that has ended for this many seconds, else for 120.
        pair.host(host)
            .sh("echo 1 >/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait")
            .await;
    }
    let client = c1.spawn(&["client-echo", &pair.host(1).ip(), "7000"]).await;
    stage.move_it(1).await;
    assert_went_on(&client.stop().await, 1);
    pair.wait_until_the_hop_is_gone(1).await;
    pair.wait_until_the_hop_is_gone(2).await;
    // One that was never needed goes at once, and another one can be had.
    let back = pair.migrate("web", 2, 1).await;
    pair.assert_moved("web", 2, 1, &back).await;
    pair.wait_until_the_hop_is_gone(2).await;
    stage.pair.down().await;
}

/// A key as a program might print it.
fn spellings(key: &[u8]) -> Vec<String> {
    use base64::Engine as _;
    use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
    let hex = |upper: bool| -> String {
        let one = |byte: &u8| match upper {
            true => format!("{byte:02X}"),
            false => format!("{byte:02x}"),
        };
        key.iter().map(one).collect()
    };
    let debug = format!("{key:?}");
    vec![
        // The last character of an unpadded text also has bits of what follows.
        STANDARD_NO_PAD.encode(&key[..key.len() / 3 * 3]),
        URL_SAFE_NO_PAD.encode(&key[..key.len() / 3 * 3]),
        hex(false),
        hex(true),
        debug.trim_matches(['[', ']']).to_owned(),
    ]
}

#[tokio::test]
async fn no_key_or_secret_is_logged_however_much_is_asked_for() {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    let pair = Pair::verbose(Lab::builder(2), "-vvv").await;
    let (h1, h2, c1) = (pair.host(1), pair.host(2), pair.client(1));
    let publish = ["-p", "7000:7000"];
    h1.run_workload("web", &publish, &["echo", "7000"]).await;
    // So that the hop stays.
    let client = c1.spawn(&["client-echo", &h1.ip(), "7000"]).await;
    let token = h2.exec(&["livemig", "-vvv", "invite"]).await;
    let join = h1
        .exec(&["livemig", "-vvv", "join", token.text(), "--name", "h2"])
        .await;
    let moved = pair.try_migrate("web", 1, 2, &[]).await;
    assert!(moved.status.success(), "{moved}");

    let mut said = String::new();
    for (host, more) in [(1, [&join, &moved]), (2, [&token, &join])] {
        said += &pair.agent(host).stdout();
        said += &pair.agent(host).stderr();
        for output in more {
            said += &output.stderr;
        }
        let host = pair.host(host);
        said += &host.sh("cat /run/livemig/hops/*; ps -eo args").await.stdout;
        said += &host
            .sh("find /var/lib/livemig/journal -type f -exec cat {} +")
            .await
            .stdout;
    }
    said += &moved.stdout;
    assert!(said.contains("TRACE"), "there is something to look through");

    let mut secrets = vec![token.text().to_owned()];
    for host in [h1, h2] {
        let pem = host
            .sh("cat /var/lib/livemig/identity/key.pem")
            .await
            .stdout;
        let body: String = pem.lines().filter(|line| !line.contains("---")).collect();
        let der = STANDARD.decode(body).expect("a PEM file");
        // The key proper, without what every key of its kind begins with.
        secrets.extend(spellings(&der[der.len() - 32..]));
        secrets.extend(
            pem.lines()
                .filter(|line| !line.contains("---"))
                .map(str::to_owned),
        );
        let keys = host
            .sh("wg show livemig1 private-key; wg show livemig1 preshared-keys | cut -f2")
            .await;
        let keys: Vec<&str> = keys.stdout.lines().filter(|key| *key != "(none)").collect();
        assert!(!keys.is_empty());
        for key in keys {
            secrets.extend(spellings(&STANDARD.decode(key).expect("a key")));
        }
    }
    for (at, secret) in secrets.iter().enumerate() {
        assert!(secret.len() > 20, "{secret}");
        if let Some(place) = said.find(secret.as_str()) {
            let around = &said[said[..place].rfind('\n').unwrap_or(0)..place];
            panic!("secret {at} stands behind:{around}");
        }
    }
    assert_went_on(&client.stop().await, 1);
    pair.down().await;
}
