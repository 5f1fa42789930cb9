//! Connections of a container as the kernel tracks them, in network namespaces. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod netns;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use futures::StreamExt;
use livemig::conntrack::hold::{HeldPorts, PortProtocol};
use livemig::conntrack::{
    Change, Direction, Entry, Event, Family, Fence, Mark, Opening, Protocol, Status, Table,
    TcpInfo, TcpSide, TcpState, Tuple, alias, steer,
};
use livemig::netlink::sockets::{self, Kind, Progress, State};
use livemig::podman::Subnet;
use livemig::tunnel::HopId;
use netns::{Net, until, within};

fn hop(number: u8) -> HopId {
    HopId::try_from(number).unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A TCP server in the container that sends back what it gets, for one connection.
fn echo_once(net: &Net, listen: &str) -> thread::JoinHandle<()> {
    let listener = net
        .container
        .run(|| TcpListener::bind(listen))
        .unwrap()
        .unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = [0; 1024];
        while let Ok(length @ 1..) = stream.read(&mut buffer) {
            stream.write_all(&buffer[..length]).unwrap();
        }
    })
}

fn say(stream: &mut TcpStream, words: &[u8]) {
    stream.write_all(words).unwrap();
    let mut back = vec![0; words.len()];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(back, words);
}

fn udp(net: &livemig::netlink::Namespace, bind: &str) -> UdpSocket {
    let socket = net.run(|| UdpSocket::bind(bind)).unwrap().unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    socket
}

#[test]
fn a_published_connection_is_seen_marked_and_heard_of() {
    let net = Net::new();
    let table = Table::open(&net.host).unwrap();
    for (server, published, container) in [
        ("10.88.0.5:80", "192.0.2.1:8080", "10.88.0.5"),
        ("[fd00:88::5]:80", "[2001:db8::1]:8080", "fd00:88::5"),
    ] {
        let echo = echo_once(&net, server);
        let published: SocketAddr = published.parse().unwrap();
        within(&net.host, async || {
            let mut events = table
                .events(&[Change::New, Change::Update, Change::Destroy])
                .unwrap();
            let mut stream = net
                .client
                .run(|| TcpStream::connect(published))
                .unwrap()
                .unwrap();
            say(&mut stream, b"before");

            let entries = table.dump_container(address(container)).await.unwrap();
            assert_eq!(entries.len(), 1, "{entries:?}");
            let entry = &entries[0];
            assert_eq!(entry.original.to(), published);
            assert_eq!(entry.original.from(), stream.local_addr().unwrap());
            assert_eq!(entry.reply.from(), server.parse().unwrap());
            assert_eq!(entry.tcp.unwrap().state, TcpState::Established);
            assert!(
                entry
                    .status
                    .has(Status::PORTABLE.and(Status::DESTINATION_NAT))
            );
            assert!(entry.counters.unwrap().0.packets >= 3);
            let flow = entry.flow_of(address(container)).unwrap();
            assert_eq!(flow.opening, Opening::Inbound);

            // The lower half of the mark is others' and survives.
            let all = Mark::from_bits(u32::MAX);
            table
                .set_mark(&entry.original, Mark::from_bits(0x2000), all)
                .await
                .unwrap();
            let (mark, mask) = flow.steering(Some(hop(3)));
            table.set_mark(&entry.original, mark, mask).await.unwrap();
            let marked = table.get(&entry.original).await.unwrap().unwrap();
            assert_eq!(marked.mark.bits(), 0x0300_2000);
            let (mark, mask) = flow.steering(None);
            table.set_mark(&entry.original, mark, mask).await.unwrap();
            assert_eq!(
                table
                    .get(&entry.original)
                    .await
                    .unwrap()
                    .unwrap()
                    .mark
                    .bits(),
                0x2000
            );
            say(&mut stream, b"after");

            table.delete(&entry.original).await.unwrap();
            table.delete(&entry.original).await.unwrap();
            assert_eq!(table.get(&entry.original).await.unwrap(), None);
            let gone = table
                .set_mark(&entry.original, Mark::NONE, Mark::MASK)
                .await;
            assert!(gone.unwrap_err().is_gone());
            let mut seen = Vec::new();
            while seen.last() != Some(&Change::Destroy) {
                match events.next().await.unwrap().unwrap() {
                    Event::Connection {
                        change,
                        entry: other,
                    } if other.original == entry.original => seen.push(change),
                    Event::Connection { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
            assert!(
                seen.contains(&Change::New) && seen.contains(&Change::Update),
                "{seen:?}"
            );
        });
        // The server is left waiting: without its entry the connection is dead.
        drop(echo);
    }
}

#[test]
fn entries_of_every_protocol_can_be_inserted_and_found_again() {
    let net = Net::new();
    let table = Table::open(&net.other).unwrap();
    let ports = (40000, 80);
    let protocols = [
        Protocol::Tcp {
            source: ports.0,
            destination: ports.1,
        },
        Protocol::Udp {
            source: ports.0,
            destination: ports.1,
        },
        Protocol::Sctp {
            source: ports.0,
            destination: ports.1,
        },
        Protocol::Icmp {
            id: 7,
            kind: 8,
            code: 0,
        },
        Protocol::Icmpv6 {
            id: 7,
            kind: 128,
            code: 0,
        },
    ];
    within(&net.other, async || {
        for protocol in protocols {
            for (source, destination) in [("192.0.2.2", "10.88.0.5"), ("2001:db8::2", "fd00:88::5")]
            {
                let v6 = source.contains(':');
                match protocol {
                    Protocol::Icmp { .. } if v6 => continue,
                    Protocol::Icmpv6 { .. } if !v6 => continue,
                    _ => {}
                }
                let original = Tuple {
                    source: address(source),
                    destination: address(destination),
                    protocol,
                };
                let entry = Entry {
                    original,
                    reply: original.inverse(),
                    status: Status::PORTABLE,
                    timeout: Duration::from_secs(300),
                    mark: Mark::to(Direction::Reply, hop(1)),
                    tcp: matches!(protocol, Protocol::Tcp { .. }).then_some(TcpInfo {
                        state: TcpState::Established,
                        original: TcpSide {
                            window_scale: 7,
                            flags: 0x03,
                        }
                        .liberal(),
                        reply: TcpSide {
                            window_scale: 9,
                            flags: 0x03,
                        }
                        .liberal(),
                    }),
                    sctp: matches!(protocol, Protocol::Sctp { .. }).then_some(
                        livemig::conntrack::SctpInfo {
                            state: 4,
                            original_tag: 0x1234_5678,
                            reply_tag: 0x9abc_def0,
                        },
                    ),
                    counters: None,
                    zone: 0,
                    id: None,
                };
                table.insert(&entry).await.unwrap();
                let found = table
                    .get(&original)
                    .await
                    .unwrap()
                    .expect("it was inserted");
                assert_eq!(
                    (&found.original, &found.reply),
                    (&entry.original, &entry.reply)
                );
                assert!(found.status.has(Status::PORTABLE), "{found:?}");
                assert!(
                    !found.status.has(Status::SOURCE_NAT)
                        && !found.status.has(Status::DESTINATION_NAT)
                );
                assert!(found.timeout > Duration::from_secs(290), "{found:?}");
                assert_eq!(
                    (found.mark, found.tcp, found.sctp),
                    (entry.mark, entry.tcp, entry.sctp)
                );
                // The same again, with another mark, is no error; something else in its place is.
                let again = Entry {
                    mark: Mark::to(Direction::Reply, hop(2)),
                    ..entry.clone()
                };
                table.insert(&again).await.unwrap();
                assert_eq!(
                    table.get(&original).await.unwrap().unwrap().mark,
                    again.mark
                );
                let mut clash = entry.clone();
                clash.reply.destination = address(if v6 { "2001:db8::9" } else { "192.0.2.9" });
                let error = table.insert(&clash).await.unwrap_err();
                assert!(
                    error.to_string().contains("another one is in its place"),
                    "{error}"
                );
            }
        }
        assert_eq!(
            table
                .dump(Family::V6)
                .await
                .unwrap()
                .iter()
                .filter(|e| e.concerns(address("fd00:88::5")))
                .count(),
            4
        );
        assert_eq!(
            table
                .dump_container(address("10.88.0.5"))
                .await
                .unwrap()
                .len(),
            4
        );
    });
}

#[test]
fn thousands_of_entries_are_inserted_marked_and_deleted_quickly() {
    let net = Net::new();
    let table = Table::open(&net.other).unwrap();
    within(&net.other, async || {
        for count in [3_000u16, 10_000] {
            let entries: Vec<Entry> = (0..count)
                .map(|port| {
                    let original = Tuple {
                        source: address("192.0.2.2"),
                        destination: address("10.88.0.5"),
                        protocol: Protocol::Tcp {
                            source: 1 + port,
                            destination: 80,
                        },
                    };
                    Entry {
                        original,
                        reply: original.inverse(),
                        status: Status::PORTABLE,
                        timeout: Duration::from_secs(300),
                        mark: Mark::NONE,
                        tcp: Some(TcpInfo {
                            state: TcpState::Established,
                            original: TcpSide::default().liberal(),
                            reply: TcpSide::default().liberal(),
                        }),
                        sctp: None,
                        counters: None,
                        zone: 0,
                        id: None,
                    }
                })
                .collect();
            let tuples: Vec<Tuple> = entries.iter().map(|e| e.original).collect();
            let start = Instant::now();
            for outcome in table.insert_all(entries).await.unwrap() {
                outcome.unwrap();
            }
            let inserted = start.elapsed();
            let start = Instant::now();
            assert_eq!(
                table
                    .dump_container(address("10.88.0.5"))
                    .await
                    .unwrap()
                    .len(),
                usize::from(count)
            );
            let dumped = start.elapsed();
            let start = Instant::now();
            let marks = tuples
                .iter()
                .map(|t| (*t, Mark::to(Direction::Reply, hop(1)), Mark::MASK))
                .collect();
            for outcome in table.set_mark_all(marks).await.unwrap() {
                outcome.unwrap();
            }
            let marked = start.elapsed();
            let start = Instant::now();
            for outcome in table.delete_all(tuples).await.unwrap() {
                outcome.unwrap();
            }
            println!(
                "{count} connections: insert {inserted:?}, dump {dumped:?}, mark {marked:?}, delete {:?}",
                start.elapsed()
            );
            assert!(
                table
                    .dump_container(address("10.88.0.5"))
                    .await
                    .unwrap()
                    .is_empty()
            );
        }
    });
}

#[test]
fn the_rules_of_hops_come_and_go_without_a_trace() {
    let net = Net::new();
    let before = net.ruleset("host");
    within(&net.host, async || {
        steer::remove(hop(3)).await.unwrap();
        assert_eq!(net.ruleset("host"), before);
        steer::install(hop(3)).await.unwrap();
        let with_three = net.ruleset("host");
        println!("{with_three}");
        assert_ne!(with_three, before);
        steer::install(hop(3)).await.unwrap();
        assert_eq!(
            net.ruleset("host"),
            with_three,
            "installing twice is installing once"
        );
        steer::install(hop(255)).await.unwrap();
        assert_eq!(steer::installed().await.unwrap(), [hop(3), hop(255)]);
        steer::remove(hop(255)).await.unwrap();
        steer::remove(hop(255)).await.unwrap();
        assert_eq!(net.ruleset("host"), with_three);
        steer::remove(hop(3)).await.unwrap();
        assert_eq!(net.ruleset("host"), before);
    });
}

/// Hands every flow of the container over to the other host, as a migration does.
async fn hand_over(net: &Net, container: &str) -> Vec<Entry> {
    let host = Table::open(&net.host).unwrap();
    let other = Table::open(&net.other).unwrap();
    let entries = host.dump_container(address(container)).await.unwrap();
    for entry in &entries {
        let flow = entry.flow_of(address(container)).unwrap();
        let subnets = [
            ("10.88.0.0/24", "10.88.0.1"),
            ("fd00:88::/64", "fd00:88::1"),
        ];
        flow.keepable(&subnets.map(|(subnet, gateway)| Subnet {
            subnet: subnet.parse().unwrap(),
            gateway: Some(address(gateway)),
            lease_range: None,
        }))
        .unwrap();
        let there = flow.at_destination(hop(1));
        // As it crosses the wire.
        let there = serde_json::from_str(&serde_json::to_string(&there).unwrap()).unwrap();
        other.insert(&there).await.unwrap();
        let (mark, mask) = flow.steering(Some(hop(3)));
        host.set_mark(&entry.original, mark, mask).await.unwrap();
    }
    entries
}

#[test]
fn udp_flows_go_on_at_the_other_host_in_every_direction() {
    for (inside, published, client_address) in [
        ("10.88.0.5", "192.0.2.1:8080", "192.0.2.2"),
        ("fd00:88::5", "[2001:db8::1]:8080", "2001:db8::2"),
    ] {
        let net = Net::new();
        let at = |ip: &str, port: u16| SocketAddr::new(address(ip), port).to_string();
        // A client of the container; the container's own client of a server outside, with an
        // answer seen; one that waits for its first answer; one whose packets only go in.
        let server = udp(&net.container, &at(inside, 80));
        let client = udp(&net.client, &at(client_address, 5000));
        let one_way = udp(&net.client, &at(client_address, 5001));
        let outside = udp(&net.client, &at(client_address, 5353));
        let asked = udp(&net.container, &at(inside, 6000));
        let asking = udp(&net.container, &at(inside, 6001));
        let mut buffer = [0; 64];
        client.send_to(b"one", published).unwrap();
        let (_, peer) = server.recv_from(&mut buffer).unwrap();
        server.send_to(b"two", peer).unwrap();
        client.recv_from(&mut buffer).unwrap();
        one_way.send_to(b"one", published).unwrap();
        let (_, one_way_peer) = server.recv_from(&mut buffer).unwrap();
        asked.send_to(b"q", at(client_address, 5353)).unwrap();
        let (_, masqueraded) = outside.recv_from(&mut buffer).unwrap();
        outside.send_to(b"a", masqueraded).unwrap();
        asked.recv_from(&mut buffer).unwrap();
        asking.send_to(b"q", at(client_address, 5353)).unwrap();
        let (_, waiting) = outside.recv_from(&mut buffer).unwrap();

        within(&net.host, async || steer::install(hop(3)).await.unwrap());
        within(&net.other, async || {
            steer::install(hop(1)).await.unwrap();
            // Nothing comes out of the hop that was not handed over.
            let copy = udp(&net.copy, &at(inside, 80));
            copy.set_nonblocking(true).unwrap();
            assert_eq!(hand_over(&net, inside).await.len(), 4);
            copy.set_nonblocking(false).unwrap();

            // The sockets "move".
            drop((server, asked, asking));
            let asked = udp(&net.copy, &at(inside, 6000));
            let asking = udp(&net.copy, &at(inside, 6001));
            let mut buffer = [0; 64];
            for round in 0..20u8 {
                client.send_to(&[round], published).unwrap();
                let (length, from) = copy.recv_from(&mut buffer).unwrap();
                assert_eq!(
                    (&buffer[..length], from),
                    (&[round][..], client.local_addr().unwrap())
                );
                copy.send_to(&[round, round], from).unwrap();
                let (length, from) = client.recv_from(&mut buffer).unwrap();
                assert_eq!((length, from), (2, published.parse().unwrap()));
            }
            // The one that only ever sent gets its first answer, from the published address.
            one_way.send_to(b"more", published).unwrap();
            assert_eq!(copy.recv_from(&mut buffer).unwrap().1, one_way_peer);
            copy.send_to(b"at last", one_way_peer).unwrap();
            assert_eq!(
                one_way.recv_from(&mut buffer).unwrap().1,
                published.parse().unwrap()
            );
            // The container's own: answers find it, and its packets leave with the old address.
            for (socket, old) in [(&asked, masqueraded), (&asking, waiting)] {
                outside.send_to(b"answer", old).unwrap();
                socket.recv_from(&mut buffer).unwrap();
                socket.send_to(b"next", at(client_address, 5353)).unwrap();
                assert_eq!(outside.recv_from(&mut buffer).unwrap().1, old);
            }
            let table = Table::open(&net.other).unwrap();
            for entry in table.dump_container(address(inside)).await.unwrap() {
                assert_eq!(
                    entry.reply,
                    entry.original.inverse(),
                    "translated at the destination"
                );
                assert!(
                    !entry.status.has(Status::SOURCE_NAT)
                        && !entry.status.has(Status::DESTINATION_NAT)
                );
            }
            // What was not handed over is dropped by the guard.
            let unknown = udp(
                &net.host,
                &at(
                    if inside.contains(':') {
                        "fd00:99::1"
                    } else {
                        "10.99.0.1"
                    },
                    9,
                ),
            );
            net.at(
                "host",
                &format!(
                    "ip route add {inside} via {} dev livemig3",
                    if inside.contains(':') {
                        "fd00:99::2"
                    } else {
                        "10.99.0.2"
                    }
                ),
            );
            unknown.send_to(b"intruder", at(inside, 80)).unwrap();
            let other = Table::open(&net.other).unwrap();
            client.send_to(b"last", published).unwrap();
            let (length, _) = copy.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"last");
            assert!(
                other
                    .dump(Family::Both)
                    .await
                    .unwrap()
                    .iter()
                    .all(|e| e.original.source != unknown.local_addr().unwrap().ip())
            );
        });
        let left = net.at("other", "nft list table inet podman");
        assert!(
            left.contains("counter packets 0"),
            "nothing was invalid: {left}"
        );
    }
}

#[test]
fn an_admitted_containers_flows_come_out_of_another_hop_too() {
    for (inside, published, client_address) in [
        ("10.88.0.5", "192.0.2.1:8080", "192.0.2.2"),
        ("fd00:88::5", "[2001:db8::1]:8080", "2001:db8::2"),
    ] {
        let net = Net::new();
        let at = |ip: &str, port: u16| SocketAddr::new(address(ip), port).to_string();
        let server = udp(&net.container, &at(inside, 80));
        let client = udp(&net.client, &at(client_address, 5000));
        let one_way = udp(&net.client, &at(client_address, 5001));
        let stranger = udp(&net.client, &at(client_address, 5002));
        let mut buffer = [0; 64];
        client.send_to(b"one", published).unwrap();
        let (_, peer) = server.recv_from(&mut buffer).unwrap();
        server.send_to(b"two", peer).unwrap();
        client.recv_from(&mut buffer).unwrap();
        one_way.send_to(b"one", published).unwrap();
        server.recv_from(&mut buffer).unwrap();

        within(&net.host, async || steer::install(hop(3)).await.unwrap());
        within(&net.other, async || {
            steer::install(hop(1)).await.unwrap();
            steer::install(hop(2)).await.unwrap();
            hand_over(&net, inside).await;
            // At the other host the flows' way back is hop 2: what comes out of hop 1 is not theirs.
            let there = Table::open(&net.other).unwrap();
            for entry in there.dump_container(address(inside)).await.unwrap() {
                let (mark, mask) = (Mark::to(Direction::Reply, hop(2)), Mark::MASK);
                there.set_mark(&entry.original, mark, mask).await.unwrap();
            }
            // A packet of a flow that was not handed over takes the hop all the same.
            stranger.send_to(b"0", published).unwrap();
            let here = Table::open(&net.host).unwrap();
            until("the stranger is known", || {
                net.at("host", "cat /proc/net/nf_conntrack")
                    .contains("sport=5002")
            });
            for entry in here.dump_container(address(inside)).await.unwrap() {
                let (mark, mask) = (Mark::to(Direction::Original, hop(3)), Mark::MASK);
                here.set_mark(&entry.original, mark, mask).await.unwrap();
            }
            let copy = udp(&net.copy, &at(inside, 80));
            let admitted = [address(inside)];
            let arrives = |words: &[u8], expected: &[u16]| {
                let there = net.received("other", "livemig1");
                for sender in [&stranger, &client, &one_way] {
                    sender.send_to(words, published).unwrap();
                }
                until("all of them come out of the hop", || {
                    net.received("other", "livemig1") >= there + 3
                });
                let mut senders = Vec::new();
                let mut buffer = [0; 64];
                loop {
                    // What is to come may have to look for its neighbour first; then for what is not.
                    let more = senders.len() < expected.len();
                    let wait = Duration::from_millis(if more { 10_000 } else { 100 });
                    copy.set_read_timeout(Some(wait)).unwrap();
                    let Ok((length, from)) = copy.recv_from(&mut buffer) else {
                        break;
                    };
                    assert_eq!(&buffer[..length], words);
                    senders.push(from.port());
                }
                assert_eq!(senders, expected);
            };
            arrives(b"too early", &[]);
            steer::admit(hop(1), &admitted).unwrap();
            steer::admit(hop(1), &admitted).unwrap();
            arrives(b"admitted", &[5000, 5001]);
            steer::install(hop(1)).await.unwrap();
            arrives(b"still admitted", &[5000, 5001]);
            steer::dismiss(hop(1), &admitted).unwrap();
            steer::dismiss(hop(1), &admitted).unwrap();
            arrives(b"too late", &[]);
            // What is admitted goes with the hop.
            steer::admit(hop(1), &admitted).unwrap();
            steer::remove(hop(1)).await.unwrap();
            steer::dismiss(hop(1), &admitted).unwrap();
            assert!(steer::admit(hop(1), &admitted).is_err());
            steer::install(hop(1)).await.unwrap();
            arrives(b"not any more", &[]);
        });
    }
}

#[test]
fn a_binding_survives_everything_that_podman_does_when_the_container_is_removed() {
    let net = Net::new();
    let server = udp(&net.container, "10.88.0.5:80");
    let client = udp(&net.client, "192.0.2.2:5000");
    client.send_to(b"one", "192.0.2.1:8080").unwrap();
    server.recv_from(&mut [0; 64]).unwrap();
    within(&net.host, async || {
        steer::install(hop(3)).await.unwrap();
        within(&net.other, async || steer::install(hop(1)).await.unwrap());
        hand_over(&net, "10.88.0.5").await;
    });
    let copy = udp(&net.copy, "10.88.0.5:80");
    // The last chain of type nat goes, and the bridge with its addresses.
    net.at("host", "nft delete table inet podman");
    net.at("host", "ip link delete bridge");
    let mut buffer = [0; 64];
    client.send_to(b"two", "192.0.2.1:8080").unwrap();
    let (_, from) = copy.recv_from(&mut buffer).unwrap();
    copy.send_to(b"three", from).unwrap();
    let (_, from) = client.recv_from(&mut buffer).unwrap();
    assert_eq!(from, "192.0.2.1:8080".parse().unwrap());
}

/// A program on the anchor, connected by 127.0.0.1 and masqueraded as the gateway, which is an
/// address of the other host too.
#[test]
fn a_program_on_the_anchor_goes_on_though_its_address_is_the_other_hosts_too() {
    goes_on_from_the_anchor("10.88.0.5", "10.88.0.1", "127.0.0.1", "peers");
}

#[test]
fn a_program_on_the_anchor_goes_on_over_ipv6() {
    goes_on_from_the_anchor("fd00:88::5", "fd00:88::1", "2001:db8::1", "peers_ip6");
}

fn goes_on_from_the_anchor(container: &str, gateway: &str, own: &str, map: &str) {
    let at = |ip: &str, port: u16| SocketAddr::new(address(ip), port).to_string();
    let net = Net::new();
    net.rules(
        "host",
        "table inet local {
           chain ports {
             type nat hook output priority -100;
             fib daddr type local meta nfproto ipv4 tcp dport 8080 dnat ip to 10.88.0.5:80
             fib daddr type local meta nfproto ipv4 udp dport 8080 dnat ip to 10.88.0.5:80
             fib daddr type local meta nfproto ipv6 udp dport 8080 dnat ip6 to [fd00:88::5]:80
           }
           chain leaving {
             type nat hook postrouting priority srcnat;
             ip saddr 127.0.0.1 masquerade
             ip6 saddr 2001:db8::1 ip6 daddr fd00:88::5 masquerade
           }
         }",
    );
    for (host, hop) in [("host", 3), ("other", 1)] {
        for setting in ["accept_local=1", "route_localnet=1"] {
            net.at(
                host,
                &format!("sysctl -qw net.ipv4.conf.livemig{hop}.{setting}"),
            );
        }
    }
    net.at("host", "sysctl -qw net.ipv4.conf.bridge.route_localnet=1");
    let subnets = [
        ("10.88.0.0/24", "10.88.0.1"),
        ("fd00:88::/64", "fd00:88::1"),
    ]
    .map(|(subnet, gateway)| Subnet {
        subnet: subnet.parse().unwrap(),
        gateway: Some(address(gateway)),
        lease_range: None,
    });
    within(&net.host, async || steer::install(hop(3)).await.unwrap());
    within(&net.other, async || steer::install(hop(1)).await.unwrap());

    let server = udp(&net.container, &at(container, 80));
    let client = udp(&net.host, &at(own, 5000));
    client.connect(at(own, 8080)).unwrap();
    let mut buffer = [0; 64];
    client.send(b"one").unwrap();
    let (_, peer) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(peer.ip(), address(gateway));
    server.send_to(b"two", peer).unwrap();
    client.recv(&mut buffer).unwrap();
    let copy = udp(&net.copy, &at(container, 80));
    let flows = within(&net.host, async || {
        let here = Table::open(&net.host).unwrap();
        let there = Table::open(&net.other).unwrap();
        let mut flows = Vec::new();
        for entry in here.dump_container(address(container)).await.unwrap() {
            let flow = entry.flow_of(address(container)).unwrap();
            flow.keepable(&subnets).unwrap();
            assert!(flow.is_tied_to_interface(), "{flow:?}");
            there.insert(&flow.at_destination(hop(1))).await.unwrap();
            let (mark, mask) = flow.steering(Some(hop(3)));
            let pinned = here
                .pin_all(vec![(entry.clone(), mark, mask)])
                .await
                .unwrap();
            assert!(pinned.iter().all(Result::is_ok), "{pinned:?}");
            let now = here.get(&entry.original).await.unwrap().unwrap();
            assert_eq!((now.original, now.reply), (entry.original, entry.reply));
            assert!(now.status.has(entry.status.portable()), "{now:?} {entry:?}");
            flows.push(flow);
        }
        let peers = alias::Peers::of(&flows, &subnets);
        peers.remember().unwrap();
        peers.remember().unwrap();
        flows
    });
    assert_eq!(flows.len(), 1);
    drop(server);
    for bridge in [true, false] {
        if !bridge {
            // Also when Podman has removed the bridge with the last container.
            net.at("host", "nft delete table inet podman");
            net.at("host", "nft delete table inet local");
            net.at("host", "ip link delete bridge");
        }
        for round in 0..10u8 {
            client.send(&[round]).unwrap();
            let (length, from) = copy.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], from), (&[round][..], peer));
            copy.send_to(&[round, round], from).unwrap();
            assert_eq!(client.recv(&mut buffer).unwrap(), 2);
        }
    }
    // An ICMP error finds its way as well.
    drop(copy);
    client.send(b"nobody there").unwrap();
    let error = client.recv(&mut buffer).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);

    within(&net.host, async || {
        let here = Table::open(&net.host).unwrap();
        let peers = || net.at("host", &format!("nft list map inet livemig {map}"));
        alias::forget_unused(&here.dump(Family::Both).await.unwrap()).unwrap();
        assert!(peers().contains("elements"));
        for flow in &flows {
            here.delete(&flow.entry.original).await.unwrap();
        }
        alias::forget_unused(&here.dump(Family::Both).await.unwrap()).unwrap();
        assert!(!peers().contains("elements"));
    });
}

#[test]
fn new_connections_to_a_container_that_has_left_are_refused_at_once_and_known_ones_go_on() {
    let net = Net::new();
    let before = net.ruleset("host");
    let at = |protocol, first| HeldPorts {
        protocol,
        address: None,
        first,
        last: first,
    };
    let fence = Fence {
        container: "0123456789abcdef".repeat(4).parse().unwrap(),
        addresses: vec![address("10.88.0.5"), address("fd00:88::5")],
        ports: vec![at(PortProtocol::Tcp, 8080), at(PortProtocol::Udp, 8080)],
    };
    // Whoever is not refused is let in: there is always somebody who listens.
    let _listeners = net
        .container
        .run(|| ["10.88.0.5:80", "[fd00:88::5]:80"].map(|at| TcpListener::bind(at).unwrap()))
        .unwrap();
    let _local = net.host.run(|| TcpListener::bind("[::]:8080").unwrap());
    let servers = ["10.88.0.5:80", "[fd00:88::5]:80"].map(|at| udp(&net.container, at));
    let connect = |from: &livemig::netlink::Namespace, to: &str| {
        let to: SocketAddr = to.parse().unwrap();
        from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(10)))
            .unwrap()
            .map_err(|error| error.kind())
    };
    let refused = std::io::ErrorKind::ConnectionRefused;
    for (published, bind, server) in [
        ("192.0.2.1:8080", "192.0.2.2:0", &servers[0]),
        ("[2001:db8::1]:8080", "[2001:db8::2]:0", &servers[1]),
    ] {
        let asking = || {
            let socket = udp(&net.client, bind);
            socket.connect(published).unwrap();
            socket.send(b"anybody there?").unwrap();
            socket
        };
        let mut buffer = [0; 64];
        within(&net.host, async || fence.prepare().await.unwrap());
        let known = connect(&net.client, published).unwrap();
        connect(&net.host, published).unwrap();
        let asked = asking();
        let (_, peer) = server.recv_from(&mut buffer).unwrap();

        within(&net.host, async || fence.refuse().unwrap());
        assert_eq!(connect(&net.client, published).unwrap_err(), refused);
        assert_eq!(connect(&net.host, published).unwrap_err(), refused);
        assert_eq!(asking().recv(&mut buffer).unwrap_err().kind(), refused);
        server.send_to(b"yes", peer).unwrap();
        assert_eq!(asked.recv(&mut buffer).unwrap(), 3);
        asked.send(b"good").unwrap();
        assert_eq!(server.recv_from(&mut buffer).unwrap(), (4, peer));
        assert_eq!(known.peer_addr().unwrap(), published.parse().unwrap());

        within(&net.host, async || fence.remove().await.unwrap());
        connect(&net.client, published).unwrap();
        asking();
        server.recv_from(&mut buffer).unwrap();
        assert_eq!(net.ruleset("host"), before);
    }
}

#[test]
fn back_home_a_cleared_mark_is_as_if_it_had_never_left() {
    let net = Net::new();
    let echo = echo_once(&net, "10.88.0.5:80");
    let mut stream = net
        .client
        .run(|| TcpStream::connect("192.0.2.1:8080"))
        .unwrap()
        .unwrap();
    say(&mut stream, b"before");
    within(&net.host, async || {
        steer::install(hop(3)).await.unwrap();
        let entries = hand_over(&net, "10.88.0.5").await;
        let there = net.received("other", "livemig1");
        stream.write_all(b"lost in the post").unwrap();
        until("the packets take the hop", || {
            net.received("other", "livemig1") > there
        });
        let table = Table::open(&net.host).unwrap();
        for entry in &entries {
            let (mark, mask) = entry.flow_of(address("10.88.0.5")).unwrap().steering(None);
            table.set_mark(&entry.original, mark, mask).await.unwrap();
        }
        // TCP sends again what went astray.
        let mut back = [0; 16];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"lost in the post");
        steer::remove(hop(3)).await.unwrap();
    });
    drop(stream);
    echo.join().unwrap();
}

#[test]
fn the_sockets_of_a_namespace_show_what_waits_in_them() {
    let net = Net::new();
    let (listener, unread) = net
        .container
        .run(|| {
            (
                TcpListener::bind("0.0.0.0:80").unwrap(),
                UdpSocket::bind("[::]:53").unwrap(),
            )
        })
        .unwrap();
    let (mut client, sender) = net
        .client
        .run(|| {
            let stream = TcpStream::connect("192.0.2.1:8080").unwrap();
            (stream, UdpSocket::bind("[::]:0").unwrap())
        })
        .unwrap();
    sender.send_to(b"unread", "[fd00:88::5]:53").unwrap();
    let mut diagnosis = sockets::Diagnosis::open(&net.container).unwrap();
    until("the datagram arrives", || {
        diagnosis
            .list()
            .unwrap()
            .iter()
            .any(|s| s.kind == Kind::Udp && s.receive_queue > 0)
    });
    let sockets = sockets::list(&net.container).unwrap();
    let listening = sockets.iter().find(|s| s.state == State::Listen).unwrap();
    assert_eq!(
        listening.receive_queue, 1,
        "one connection waits to be accepted"
    );
    assert!(listening.has_undelivered());
    let connection = sockets
        .iter()
        .find(|s| s.state == State::Established)
        .unwrap();
    assert_eq!(connection.remote, client.local_addr().unwrap());
    assert!(
        sockets
            .iter()
            .any(|s| s.kind == Kind::Udp && s.has_undelivered())
    );
    let mut buffer = [0; 16];
    unread.recv_from(&mut buffer).unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    assert!(
        !sockets::list(&net.container)
            .unwrap()
            .iter()
            .any(|s| s.has_undelivered())
    );
    let ends = (
        accepted.local_addr().unwrap(),
        accepted.peer_addr().unwrap(),
    );
    let gone = (ends.0, SocketAddr::new(ends.1.ip(), 1));
    let mut progress = |(local, remote)| diagnosis.progress(local, remote).unwrap();
    let none = Progress {
        sent: 0,
        received: 0,
        unread: 0,
    };
    assert_eq!(progress(gone), None);
    assert_eq!(progress(ends), Some(none));
    accepted.write_all(b"x").unwrap();
    assert_eq!(progress(ends), Some(Progress { sent: 1, ..none }));
    client.write_all(b"abc").unwrap();
    let arrived = Progress {
        sent: 1,
        received: 3,
        unread: 3,
    };
    until("three bytes arrive", || progress(ends) == Some(arrived));
    accepted.read_exact(&mut [0; 2]).unwrap();
    let partly = Progress {
        unread: 1,
        ..arrived
    };
    assert_eq!(progress(ends), Some(partly));
}
