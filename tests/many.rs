//! Many migrations at the same moment: nothing that they share gets into their way.

mod lab;

use futures::future::join_all;
use lab::Lab;
use lab::pair::{Pair, assert_went_on, report};

/// How many containers leave each of the two hosts.
const EACH_WAY: usize = 4;

#[tokio::test]
async fn eight_at_once_in_both_directions() {
    let pair = Pair::of(Lab::builder(2)).await;
    for host in [1, 2] {
        let time_wait = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait";
        pair.host(host).sh(&format!("echo 1 >{time_wait}")).await;
    }
    let from = |number: usize| 1 + number % 2;
    let name = |number: usize| format!("web{number}");
    let mut clients = Vec::new();
    for number in 0..2 * EACH_WAY {
        let port = (7000 + number).to_string();
        let host = pair.host(from(number));
        // Each host gives out the same addresses by itself, and two cannot be on one host.
        let address = format!("10.88.1.{}", 10 + number);
        let publish = format!("{port}:{port}");
        let podman = ["-p", &publish, "--ip", &address];
        host.run_workload(&name(number), &podman, &["echo", &port])
            .await;
        let talk = ["--connections", "3", "--every-ms", "20"];
        let ip = host.ip();
        let client = [&["client-echo", &ip, &port], &talk[..]].concat();
        clients.push(pair.client(1).spawn(&client).await);
    }

    let migrations: Vec<_> = (0..2 * EACH_WAY)
        .map(|number| {
            pair.spawn_migration(&name(number), from(number), 3 - from(number), &[])
                .finish()
        })
        .collect();
    for (number, output) in join_all(migrations).await.iter().enumerate() {
        assert!(output.status.success(), "{output}");
        let report = report(output);
        pair.assert_moved(&name(number), from(number), 3 - from(number), &report)
            .await;
    }
    // Each host has one hop to the other, whoever was first to want one.
    for host in [1, 2] {
        let links = pair.host(host).sh("ip -o link | grep -c livemig").await;
        assert_eq!(links.text(), "1");
    }
    for client in clients {
        assert_went_on(&client.stop().await, 3);
    }
    for host in [1, 2] {
        pair.wait_until_the_hop_is_gone(host).await;
    }
    pair.down().await;
}

#[tokio::test]
async fn two_sources_send_into_one_destination() {
    let pair = Pair::of(Lab::builder(3)).await;
    let mut clients = Vec::new();
    for source in [1, 2] {
        let address = format!("10.88.1.{source}");
        let podman = ["-p", "7000:7000", "--ip", &address];
        let podman = match source {
            1 => podman,
            // Their ports meet at the destination.
            _ => ["-p", "7001:7000", podman[2], podman[3]],
        };
        let host = pair.host(source);
        let (name, ip) = (format!("web{source}"), host.ip());
        host.run_workload(&name, &podman, &["echo", "7000"]).await;
        let port = if source == 1 { "7000" } else { "7001" };
        let client = ["client-echo", &ip, port, "--connections", "3"];
        clients.push(pair.client(1).spawn(&client).await);
    }
    let migrations = [1, 2].map(|source| {
        pair.spawn_migration(&format!("web{source}"), source, 3, &[])
            .finish()
    });
    for (index, output) in join_all(migrations).await.iter().enumerate() {
        assert!(output.status.success(), "{output}");
        let name = format!("web{}", index + 1);
        pair.assert_moved(&name, index + 1, 3, &report(output))
            .await;
    }
    for client in clients {
        assert_went_on(&client.stop().await, 3);
    }
    pair.down().await;
}
