//! A small network for tests, in namespaces of its own: a client, two hosts, and the same
//! container address behind each of them.
//!
//! ```text
//! client 192.0.2.2 ─── 192.0.2.1 host ─── 10.88.0.1 │ 10.88.0.5 container
//!                                  │ livemig3
//!                                  │ livemig1
//!                                other ─── 10.88.0.1 │ 10.88.0.5 copy
//! ```
//!
//! The host publishes ports 8080 and 8081 of the container as its ports 80 and 81 do, translates
//! what the container sends out, and drops what conntrack calls invalid. The "hop" between the two
//! hosts is a plain pair of interfaces with the names and routes of a hop.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use livemig::netlink::Namespace;

pub struct Net {
    prefix: String,
    pub client: Namespace,
    pub host: Namespace,
    pub container: Namespace,
    pub other: Namespace,
    pub copy: Namespace,
}

const NAMES: [&str; 5] = ["client", "host", "container", "other", "copy"];

/// Runs a program and returns what it printed; panics with what it said if it fails.
pub fn run(arguments: &[&str]) -> String {
    let (program, rest) = arguments.split_first().expect("a program");
    let output = Command::new(program)
        .args(rest)
        .output()
        .unwrap_or_else(|e| panic!("{program} is needed for this test: {e}"));
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

/// Polls until `ready` says yes, or panics.
pub fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !ready() {
        assert!(Instant::now() < deadline, "waited 10 s in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs `work` in a namespace, on a runtime of its own whose threads all live there.
pub fn within<T: Send>(namespace: &Namespace, work: impl AsyncFnOnce() -> T + Send) -> T {
    namespace
        .run(|| {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime")
                .block_on(work())
        })
        .expect("the namespace")
}

impl Net {
    pub fn new() -> Net {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!(
            "lmt{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        for name in NAMES {
            run(&["ip", "netns", "add", &format!("{prefix}-{name}")]);
        }
        let open = |name: &str| {
            Namespace::path(Path::new(&format!("/run/netns/{prefix}-{name}"))).expect("netns")
        };
        let net = Net {
            client: open("client"),
            host: open("host"),
            container: open("container"),
            other: open("other"),
            copy: open("copy"),
            prefix,
        };
        for name in NAMES {
            net.at(name, "ip link set lo up");
        }
        let link =
            |a: &str, an: &str, a_addresses: &[&str], b: &str, bn: &str, b_addresses: &[&str]| {
                let (an_ns, bn_ns) = (net.name(a), net.name(b));
                run(&[
                    "ip", "link", "add", an, "netns", &an_ns, "type", "veth", "peer", "name", bn,
                    "netns", &bn_ns,
                ]);
                for (ns, interface, addresses) in [(a, an, a_addresses), (b, bn, b_addresses)] {
                    for address in addresses {
                        let nodad = if address.contains(':') { " nodad" } else { "" };
                        net.at(
                            ns,
                            &format!("ip address add {address} dev {interface}{nodad}"),
                        );
                    }
                    net.at(ns, &format!("ip link set {interface} up"));
                }
            };
        link(
            "client",
            "eth0",
            &["192.0.2.2/24", "2001:db8::2/64"],
            "host",
            "wan",
            &["192.0.2.1/24", "2001:db8::1/64"],
        );
        link(
            "host",
            "bridge",
            &["10.88.0.1/24", "fd00:88::1/64"],
            "container",
            "eth0",
            &["10.88.0.5/24", "fd00:88::5/64"],
        );
        link(
            "other",
            "bridge",
            &["10.88.0.1/24", "fd00:88::1/64"],
            "copy",
            "eth0",
            &["10.88.0.5/24", "fd00:88::5/64"],
        );
        link(
            "host",
            "livemig3",
            &["10.99.0.1/30", "fd00:99::1/64"],
            "other",
            "livemig1",
            &["10.99.0.2/30", "fd00:99::2/64"],
        );
        for host in ["host", "other"] {
            for setting in [
                "net.ipv4.ip_forward=1",
                "net.ipv6.conf.all.forwarding=1",
                "net.netfilter.nf_conntrack_tcp_loose=0",
                "net.netfilter.nf_conntrack_acct=1",
                "net.ipv4.conf.all.rp_filter=0",
            ] {
                net.at(host, &format!("sysctl -qw {setting}"));
            }
        }
        net.at("client", "ip route add default via 192.0.2.1");
        net.at("client", "ip -6 route add default via 2001:db8::1");
        for inside in ["container", "copy"] {
            net.at(inside, "ip route add default via 10.88.0.1");
            net.at(inside, "ip -6 route add default via fd00:88::1");
        }
        // Even loose reverse-path filtering wants some route back to the container's address, also
        // when the bridge is gone.
        net.at("host", "ip route add default via 192.0.2.2");
        // The other host's own way out, which must not be taken.
        link(
            "client",
            "eth1",
            &["198.51.100.2/24", "2001:db8:1::2/64"],
            "other",
            "wan",
            &["198.51.100.1/24", "2001:db8:1::1/64"],
        );
        net.at("other", "ip route add default via 198.51.100.2");
        net.at("other", "ip -6 route add default via 2001:db8:1::2");
        // A hop: a routing table, and a rule by packet mark. The veth needs next hops.
        for (host, hop, v4, v6) in [
            ("host", 3u32, "10.99.0.2", "fd00:99::2"),
            ("other", 1, "10.99.0.1", "fd00:99::1"),
        ] {
            let table = 0x6c_6d00 + hop;
            let mark = format!("{:#x}/0xff000000", hop << 24);
            for (version, next) in [("-4", v4), ("-6", v6)] {
                net.at(
                    host,
                    &format!(
                        "ip {version} route add default via {next} dev livemig{hop} table {table}"
                    ),
                );
                net.at(
                    host,
                    &format!("ip {version} rule add fwmark {mark} lookup {table} priority 100"),
                );
            }
            net.at(
                host,
                &format!("sysctl -qw net.ipv4.conf.livemig{hop}.rp_filter=2"),
            );
            // A tunnel has no neighbours to be found, and the guard would not let the search in.
            let ether = |last| format!("02:00:00:00:00:{last:02}");
            net.at(
                host,
                &format!("ip link set livemig{hop} address {}", ether(hop)),
            );
            net.at(
                host,
                &format!(
                    "ip -6 neighbour replace {v6} lladdr {} dev livemig{hop}",
                    ether(4 - hop)
                ),
            );
        }
        for host in ["host", "other"] {
            net.rules(
                host,
                "table inet podman {
                   chain ports {
                     type nat hook prerouting priority dstnat;
                     fib daddr type local meta nfproto ipv4 tcp dport 8080 dnat ip to 10.88.0.5:80
                     fib daddr type local meta nfproto ipv4 udp dport 8080 dnat ip to 10.88.0.5:80
                     fib daddr type local meta nfproto ipv6 tcp dport 8080 dnat ip6 to [fd00:88::5]:80
                     fib daddr type local meta nfproto ipv6 udp dport 8080 dnat ip6 to [fd00:88::5]:80
                   }
                   chain leaving {
                     type nat hook postrouting priority srcnat;
                     ip saddr 10.88.0.0/24 ip daddr != 10.88.0.0/24 masquerade
                     ip6 saddr fd00:88::/64 ip6 daddr != fd00:88::/64 masquerade
                   }
                   chain passing {
                     type filter hook forward priority filter;
                     ct state invalid counter drop
                   }
                 }",
            );
        }
        net
    }

    fn name(&self, which: &str) -> String {
        format!("{}-{which}", self.prefix)
    }

    /// Runs a command line in a namespace.
    pub fn at(&self, which: &str, line: &str) -> String {
        let name = self.name(which);
        let mut arguments = vec!["ip", "netns", "exec", &name];
        arguments.extend(line.split_whitespace());
        run(&arguments)
    }

    /// Loads nftables rules in a namespace.
    pub fn rules(&self, which: &str, rules: &str) {
        let name = self.name(which);
        run(&["ip", "netns", "exec", &name, "nft", rules]);
    }

    /// The whole rule set of a namespace, without handles.
    pub fn ruleset(&self, which: &str) -> String {
        self.at(which, "nft -s list ruleset")
    }

    /// How many packets an interface has received.
    pub fn received(&self, which: &str, interface: &str) -> u64 {
        let path = format!("cat /sys/class/net/{interface}/statistics/rx_packets");
        self.at(which, &path).trim().parse().expect("a number")
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in NAMES {
            let _ = Command::new("ip")
                .args(["netns", "del", &self.name(name)])
                .output();
        }
    }
}
