//! Hosts that reach each other by IPv6 alone, and what runs on them over either family.

mod lab;

use lab::Lab;
use lab::pair::Pair;

/// A network of both families, which each host has.
const NETWORK: &str = "dual";

async fn hosts() -> Pair {
    let pair = Pair::over_ipv6(Lab::builder(2)).await;
    pair.host(1)
        .exec(&["podman", "network", "create", "--ipv6", NETWORK])
        .await;
    pair
}

#[tokio::test]
async fn connections_of_both_families_go_through_a_hop_over_ipv6() {
    let pair = hosts().await;
    let (h1, c1) = (pair.host(1), pair.client(1));
    let podman = ["--network", NETWORK, "-p", "7000:7000"];
    h1.run_workload("web", &podman, &["echo", "7000", "--host", "v6"])
        .await;
    let addresses = async |host: usize| {
        let format =
            "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}";
        let inspect = ["podman", "inspect", "--format", format, "web"];
        pair.host(host).exec(&inspect).await.text().to_owned()
    };
    let before = addresses(1).await;
    let (four, six) = (h1.ip(), h1.address6().to_string());
    let over4 = c1.spawn(&["client-echo", &four, "7000"]).await;
    let over6 = c1.spawn(&["client-echo", &six, "7000"]).await;
    let report = pair.migrate("web", 1, 2).await;
    pair.assert_moved("web", 1, 2, &report).await;
    // It has kept an address of each family.
    assert_eq!(addresses(2).await, before);
    assert_eq!(before.split_whitespace().count(), 2, "{before}");
    for client in [over4, over6] {
        let client = client.stop().await;
        assert_eq!(client["connected"], 1, "{client}");
        assert_eq!(client["wrong"], 0, "{client}");
        assert_eq!(client["resets"], 0, "{client}");
        assert_eq!(client["unanswered"], 0, "{client}");
        assert_eq!(client["same_socket"], true, "{client}");
    }
    pair.down().await;
}

#[tokio::test]
async fn datagrams_over_ipv6_go_through_a_hop_over_ipv6() {
    let pair = hosts().await;
    let (h1, c1) = (pair.host(1), pair.client(1));
    let podman = ["--network", NETWORK, "-p", "7000:7000/udp"];
    h1.run_workload("names", &podman, &["udp-echo", "7000", "--host", "v6"])
        .await;
    let six = h1.address6().to_string();
    let client = c1
        .spawn(&["client-udp", &six, "7000", "--rate", "1000"])
        .await;
    let report = pair.migrate("names", 1, 2).await;
    pair.assert_moved("names", 1, 2, &report).await;
    let client = client.stop().await;
    println!("lost {} of {}", client["lost"], client["sent"]);
    let number = |name: &str| client[name].as_u64().expect("a number");
    // The last one came back, from where the container is now.
    assert_eq!(number("highest") + 1, number("sent"), "{client}");
    assert_eq!(number("duplicated"), 0, "{client}");
    assert_eq!(number("lost"), 0, "{client}");
    pair.down().await;
}
