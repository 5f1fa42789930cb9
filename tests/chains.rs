//! From host to host and back: paths stay as short as they can be.

mod lab;

use lab::pair::{Pair, assert_went_on};
use lab::{Lab, Workload};
use serde_json::Value;

/// Hosts whose kernels soon forget a connection that has ended; else it takes two minutes.
async fn forgetful(hosts: usize, clients: usize) -> Pair {
    let pair = Pair::of(Lab::builder(hosts).clients(clients)).await;
    for host in 1..=hosts {
        let time_wait = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait";
        pair.host(host).sh(&format!("echo 1 >{time_wait}")).await;
    }
    pair
}

#[tokio::test]
async fn back_home_nothing_is_in_the_way() {
    let ports = ["-p", "7000:7000"];
    let pair = forgetful(2, 2).await;
    pair.host(1)
        .run_workload("web", &ports, &["echo", "7000"])
        .await;
    let (at_h1, at_h2) = (pair.host(1).ip(), pair.host(2).ip());
    let first = pair
        .client(1)
        .spawn(&["client-echo", &at_h1, "7000", "--connections", "3"])
        .await;
    let there = pair.migrate("web", 1, 2).await;
    pair.assert_moved("web", 1, 2, &there).await;
    let second = pair
        .client(2)
        .spawn(&["client-echo", &at_h2, "7000", "--connections", "2"])
        .await;

    let back = pair.migrate("web", 2, 1).await;
    pair.assert_moved("web", 2, 1, &back).await;
    // Those that began at the second host come through it, and there is a hop as long as they live.
    pair.host(1).sh("ip link show livemig1").await;
    assert_went_on(&second.stop().await, 2);
    pair.wait_until_the_hop_is_gone(2).await;
    pair.wait_until_the_hop_is_gone(1).await;
    // Those that began at the first one need nothing of livemig's any more.
    let marks = pair
        .host(1)
        .sh("conntrack -L 2>/dev/null | grep -v 'mark=0 ' || true")
        .await;
    assert_eq!(marks.text(), "");
    assert_went_on(&first.stop().await, 3);
    pair.down().await;
}

/// Connections of two clients, one that began at the first host and one at the second, and a container
/// that has come to the third by way of both.
struct Chain {
    pair: Pair,
    from_h1: Workload,
    from_h2: Workload,
    report: Value,
}

async fn chain(pair: Pair, more: &[&str]) -> Chain {
    pair.host(1)
        .run_workload("web", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    let (at_h1, at_h2) = (pair.host(1).ip(), pair.host(2).ip());
    let many = ["--connections", "3"];
    let from_h1 = pair
        .client(1)
        .spawn(&[&["client-echo", &at_h1, "7000"], &many[..]].concat())
        .await;
    pair.migrate("web", 1, 2).await;
    let from_h2 = pair
        .client(2)
        .spawn(&[&["client-echo", &at_h2, "7000"], &many[..]].concat())
        .await;
    let moved = pair.try_migrate("web", 2, 3, more).await;
    assert!(moved.status.success(), "{moved}");
    let report = lab::pair::report(&moved);
    pair.assert_moved("web", 2, 3, &report).await;
    Chain {
        pair,
        from_h1,
        from_h2,
        report,
    }
}

#[tokio::test]
async fn a_host_in_the_middle_can_be_switched_off() {
    let chain = chain(forgetful(3, 2).await, &[]).await;
    let paths = &chain.report["paths"];
    assert_eq!(paths[0]["anchor"], "h1", "{}", chain.report);
    assert_eq!(paths[0]["flows"], 3, "{}", chain.report);
    assert_eq!(paths[0]["kept"], Value::Null, "{}", chain.report);
    // Those that began at the middle host need it.
    assert_went_on(&chain.from_h2.stop().await, 3);
    let pair = chain.pair;
    pair.host(2).crash().await;
    // Not one answer is missing from here on.
    let mut from_h1 = chain.from_h1;
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert!(from_h1.is_running());
    assert_went_on(&from_h1.stop().await, 3);
    pair.wait_until_the_hop_is_gone(3).await;
    pair.down().await;
}

#[tokio::test]
async fn home_by_way_of_two_others() {
    let chain = chain(forgetful(3, 2).await, &[]).await;
    let back = chain.pair.migrate("web", 3, 1).await;
    chain.pair.assert_moved("web", 3, 1, &back).await;
    let marks = "conntrack -L 2>/dev/null | grep -v 'mark=0 ' || true";
    assert_went_on(&chain.from_h2.stop().await, 3);
    for host in 1..=3 {
        chain.pair.wait_until_the_hop_is_gone(host).await;
        assert_eq!(chain.pair.host(host).sh(marks).await.text(), "");
    }
    assert_went_on(&chain.from_h1.stop().await, 3);
    chain.pair.down().await;
}

#[tokio::test]
async fn a_chain_that_is_kept_works_and_goes_home() {
    let chain = chain(forgetful(3, 2).await, &["--keep-chain"]).await;
    let path = &chain.report["paths"][0];
    assert_eq!(path["flows"], 3, "{}", chain.report);
    assert!(path["kept"].is_string(), "{}", chain.report);
    let back = chain.pair.migrate("web", 3, 1).await;
    chain.pair.assert_moved("web", 3, 1, &back).await;
    assert_went_on(&chain.from_h2.stop().await, 3);
    for host in 1..=3 {
        chain.pair.wait_until_the_hop_is_gone(host).await;
    }
    assert_went_on(&chain.from_h1.stop().await, 3);
    chain.pair.down().await;
}

#[tokio::test]
async fn strangers_are_introduced_if_both_allow_it() {
    let pair = Pair::chained(Lab::builder(3).clients(2)).await;
    let chain = chain(pair, &[]).await;
    let path = &chain.report["paths"][0];
    assert_eq!(path["flows"], 3, "{}", chain.report);
    let kept = path["kept"].as_str().unwrap_or_default();
    assert!(kept.contains("not known"), "{}", chain.report);
    // The chain works meanwhile; and now home, where it is tried again.
    let pair = chain.pair;
    for host in [1, 3] {
        pair.host(host)
            .exec(&["livemig", "allow", "h2", "send", "receive", "introduce"])
            .await;
    }
    pair.migrate("web", 3, 2).await;
    let report = pair.migrate("web", 2, 3).await;
    let path = &report["paths"][0];
    assert_eq!(path["anchor"], "h1", "{report}");
    assert_eq!(path["flows"], 3, "{report}");
    assert_eq!(path["kept"], Value::Null, "{report}");
    // Who was introduced may do nothing else.
    let known = pair.host(3).exec(&["livemig", "--json", "hosts"]).await;
    let known: Value = serde_json::from_str(&known.stdout).expect("a list");
    let introduced = known.as_array().expect("a list").iter();
    let introduced: Vec<&Value> = introduced.filter(|host| host["name"] == "h1").collect();
    assert_eq!(introduced.len(), 1, "{known}");
    assert_eq!(introduced[0]["may"], serde_json::json!([]), "{known}");
    let refused = pair.try_migrate("web", 3, 1, &[]).await;
    assert_eq!(refused.status.code(), Some(3), "{refused}");
    assert_went_on(&chain.from_h2.stop().await, 3);
    pair.host(2).crash().await;
    assert_went_on(&chain.from_h1.stop().await, 3);
    pair.down().await;
}

#[tokio::test]
async fn flows_are_shown_live_with_their_hops_and_counters() {
    let pair = Pair::up().await;
    pair.host(1)
        .run_workload("web", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    let ip = pair.host(1).ip();
    let client = pair.client(1).spawn(&["client-echo", &ip, "7000"]).await;
    pair.migrate("web", 1, 2).await;
    // The host that it has left knows it by its address, the one that it is on by its name.
    for (host, name, other) in [(1, Value::Null, "h2"), (2, Value::from("web"), "h1")] {
        let live = ["livemig", "--json", "flows", "--watch"];
        let live = pair.host(host).spawn_command(&live);
        let lists = loop {
            let lines = live.stdout();
            let lists: Vec<Value> = lines
                .split_inclusive('\n')
                .filter(|line| line.ends_with('\n'))
                .map(|line| serde_json::from_str(line).expect("a list a line"))
                .collect();
            if lists.len() >= 2 {
                break lists;
            }
            tokio::time::sleep(lab::LOOK).await;
        };
        live.stop().await;
        let bytes = |list: &Value| {
            assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
            assert_eq!(list[0]["container"], name, "{list}");
            assert!(list[0]["hops"].to_string().contains(other), "{list}");
            let counters = &list[0]["flow"]["entry"]["counters"];
            (
                counters[0]["bytes"].as_u64().expect("a number"),
                counters[1]["bytes"].as_u64().expect("a number"),
            )
        };
        let (before, after) = (bytes(&lists[0]), bytes(&lists[1]));
        assert!(after.0 > before.0 && after.1 > before.1, "{lists:?}");
    }
    assert_went_on(&client.stop().await, 1);
    pair.down().await;
}

#[tokio::test]
async fn a_chain_stays_when_its_anchor_does_not_answer() {
    let pair = forgetful(3, 1).await;
    let h1 = pair.host(1);
    h1.run_workload("web", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    let many = ["--connections", "3"];
    let ip = h1.ip();
    let client = [&["client-echo", &ip, "7000"], &many[..]].concat();
    let client = pair.client(1).spawn(&client).await;
    pair.migrate("web", 1, 2).await;
    h1.sh("nft add table inet deaf
           nft add chain inet deaf input '{ type filter hook input priority 0; }'
           nft add rule inet deaf input tcp dport 27757 reject with tcp reset")
        .await;
    let report = pair.migrate("web", 2, 3).await;
    pair.assert_moved("web", 2, 3, &report).await;
    assert_eq!(report["paths"][0]["flows"], 3, "{report}");
    assert!(report["paths"][0]["kept"].is_string(), "{report}");
    // The third host was told of a change that never came.
    h1.sh("nft delete table inet deaf").await;
    let back = pair.migrate("web", 3, 1).await;
    pair.assert_moved("web", 3, 1, &back).await;
    for host in 1..=3 {
        pair.wait_until_the_hop_is_gone(host).await;
    }
    assert_went_on(&client.stop().await, 3);
    pair.down().await;
}

#[tokio::test]
async fn new_connections_take_the_direct_way_too() {
    let pair = forgetful(3, 1).await;
    let h1 = pair.host(1);
    h1.run_workload("web", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    let ip = h1.ip();
    let client = ["client-echo", &ip, "7000", "--connections", "3"];
    let first = pair.client(1).spawn(&client).await;
    let moved = pair.try_migrate("web", 1, 2, &["--forward-new"]).await;
    assert!(moved.status.success(), "{moved}");
    let second = pair.client(1).spawn(&client).await;
    let report = pair.migrate("web", 2, 3).await;
    pair.assert_moved("web", 2, 3, &report).await;
    assert_eq!(report["paths"][0]["flows"], 6, "{report}");
    assert_eq!(report["paths"][0]["kept"], Value::Null, "{report}");
    pair.host(2).crash().await;
    let third = pair.client(1).spawn(&client).await;
    for client in [first, second, third] {
        assert_went_on(&client.stop().await, 3);
    }
    h1.exec(&["livemig", "flows", "--stop-forwarding", "web"])
        .await;
    for host in [1, 3] {
        pair.wait_until_the_hop_is_gone(host).await;
    }
    pair.down().await;
}
