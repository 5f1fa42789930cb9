//! Packets held in the kernel and released in order, in network namespaces. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod netns;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use livemig::conntrack::hold::{
    self, HeldPorts, Hold, HoldSpec, Intake, Pace, PortProtocol, Rate, Reserved, Side, To,
};
use livemig::conntrack::{Table, steer};
use livemig::netlink::Namespace;
use livemig::tunnel::HopId;
use netns::{Net, until, within};

const QUEUE: u16 = 4711;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn hop(number: u8) -> HopId {
    HopId::try_from(number).unwrap()
}

fn spec() -> HoldSpec {
    let port = |protocol| HeldPorts {
        protocol,
        address: None,
        first: 8080,
        last: 8081,
    };
    HoldSpec {
        ports: vec![port(PortProtocol::Tcp), port(PortProtocol::Udp)],
        hop: Some(hop(3)),
        ..HoldSpec::new(QUEUE, vec![address("10.88.0.5"), address("fd00:88::5")])
    }
}

/// Releases everything at once, and waits until the rules are gone.
async fn release(hold: Hold, to: To) -> hold::HoldReport {
    let released = hold.release(to, Pace::Unpaced).await.unwrap();
    released.clear().await.unwrap()
}

fn udp(net: &Namespace, bind: &str) -> UdpSocket {
    let socket = net.run(|| UdpSocket::bind(bind)).unwrap().unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    socket
}

fn number(socket: &UdpSocket) -> u32 {
    let mut buffer = [0; 16];
    socket.recv(&mut buffer).unwrap();
    u32::from_be_bytes(buffer[..4].try_into().unwrap())
}

fn send(socket: &UdpSocket, number: u32, to: &str) {
    let mut datagram = [0; 16];
    datagram[..4].copy_from_slice(&number.to_be_bytes());
    socket.send_to(&datagram, to).unwrap();
}

#[test]
fn datagrams_are_held_and_then_delivered_in_order_and_nothing_is_left_behind() {
    let net = Net::new();
    let before = net.ruleset("host");
    let server = udp(&net.container, "0.0.0.0:80");
    let known = udp(&net.client, "192.0.2.2:5000");
    // This one begins during the hold: conntrack has no entry for it.
    let unknown = udp(&net.client, "192.0.2.2:5001");
    let server6 = udp(&net.container, "[fd00:88::5]:80");
    let six = udp(&net.client, "[2001:db8::2]:5006");
    send(&known, 0, "192.0.2.1:8080");
    assert_eq!(number(&server), 0);
    within(&net.host, async || {
        let hold = Hold::start(spec()).await.unwrap();
        println!("{}", net.at("host", "nft list table inet livemig"));
        for n in 1..=1000 {
            send(&known, n, "192.0.2.1:8080");
            if n <= 100 {
                send(&unknown, 10_000 + n, "192.0.2.1:8080");
                send(&six, n, "[2001:db8::1]:8080");
            }
        }
        until("all is held", || hold.held() == 1200);
        server.set_nonblocking(true).unwrap();
        assert!(server.recv(&mut [0; 16]).is_err(), "nothing got through");
        server.set_nonblocking(false).unwrap();
        // A socket's default buffer holds a few hundred small datagrams, fewer than come at once.
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&server, 8 << 20).unwrap();
        let reader = thread::spawn({
            let server = server.try_clone().unwrap();
            move || (0..1100).map(|_| number(&server)).collect::<Vec<_>>()
        });
        let report = release(hold, To::Destination).await;
        println!("{report:?}");
        let got = reader.join().unwrap();
        let (fresh, old): (Vec<u32>, Vec<u32>) = got.into_iter().partition(|n| *n > 10_000);
        assert_eq!(old, (1..=1000).collect::<Vec<_>>());
        assert_eq!(fresh, (10_001..=10_100).collect::<Vec<_>>());
        for n in 1..=100 {
            assert_eq!(number(&server6), n);
        }
        assert_eq!(
            (
                report.held,
                report.released,
                report.discarded,
                report.dropped_by_bound
            ),
            (1200, 1200, 0, 0)
        );
        assert_eq!(report.peak, 1200);
        assert!(report.longest_held > Duration::from_millis(1));
        assert_eq!(net.ruleset("host"), before);
        send(&known, 1001, "192.0.2.1:8080");
        assert_eq!(number(&server), 1001);
    });
}

#[test]
fn a_release_under_traffic_loses_and_reorders_nothing() {
    let net = Net::new();
    let server = udp(&net.container, "0.0.0.0:80");
    let client = udp(&net.client, "192.0.2.2:5000");
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&server, 64 << 20).unwrap();
    let stop = AtomicBool::new(false);
    let sent = AtomicU32::new(0);
    let got = AtomicU32::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            // As fast as it goes, but never more under way than the receiver's buffer takes.
            while !stop.load(Ordering::Relaxed) {
                let n = sent.load(Ordering::Relaxed);
                if n < got.load(Ordering::Relaxed) + 20_000 {
                    send(&client, n, "192.0.2.1:8080");
                    sent.store(n + 1, Ordering::Relaxed);
                } else {
                    thread::yield_now();
                }
            }
            // The last one tells the reader to end.
            send(&client, u32::MAX, "192.0.2.1:8080");
        });
        let reader = scope.spawn(|| {
            let mut next = 0;
            loop {
                match number(&server) {
                    u32::MAX => return next,
                    n => {
                        assert_eq!(n, next, "lost or out of order");
                        next += 1;
                        got.store(next, Ordering::Relaxed);
                    }
                }
            }
        });
        let start = Instant::now();
        within(&net.host, async || {
            for round in 0..10 {
                let before = got.load(Ordering::Relaxed);
                until("traffic", || {
                    got.load(Ordering::Relaxed) > before + 200 || reader.is_finished()
                });
                let hold = Hold::start(spec()).await.unwrap();
                until("packets are held", || {
                    hold.held() >= 100 || reader.is_finished()
                });
                let to = if round % 2 == 0 {
                    To::Destination
                } else {
                    To::Source
                };
                let report = release(hold, to).await;
                println!("{report:?}");
                assert_eq!(report.held, report.released, "{report:?}");
                assert_eq!(report.dropped_by_bound, 0);
            }
        });
        stop.store(true, Ordering::Relaxed);
        let rate = f64::from(sent.load(Ordering::Relaxed)) / start.elapsed().as_secs_f64();
        println!("{rate:.0} datagrams a second");
        assert_eq!(reader.join().unwrap(), sent.load(Ordering::Relaxed));
    });
}

#[test]
fn holds_and_hops_that_come_and_go_do_not_cost_others_their_packets() {
    let net = Net::new();
    let before = net.ruleset("host");
    let server = udp(&net.container, "0.0.0.0:80");
    let client = udp(&net.client, "192.0.2.2:5000");
    within(&net.host, async || {
        let started = Instant::now();
        let hold = Hold::start(spec()).await.unwrap();
        println!("start: {:?}", started.elapsed());
        for n in 0..100 {
            send(&client, n, "192.0.2.1:8080");
        }
        until("all is held", || hold.held() == 100);
        let other = HoldSpec::new(QUEUE + 1, vec![address("10.88.0.6")]);
        let other = Hold::start(other).await.unwrap();
        steer::install(hop(9)).await.unwrap();
        release(other, To::Destination).await;
        steer::remove(hop(9)).await.unwrap();
        let started = Instant::now();
        let report = release(hold, To::Source).await;
        println!("release: {:?}", started.elapsed());
        assert_eq!(report.released, 100);
        for n in 0..100 {
            assert_eq!(number(&server), n);
        }
        assert_eq!(net.ruleset("host"), before);
    });
}

#[test]
fn connections_wait_and_go_on() {
    let net = Net::new();
    let listener = net
        .container
        .run(|| TcpListener::bind("0.0.0.0:80"))
        .unwrap()
        .unwrap();
    let outside = net
        .client
        .run(|| TcpListener::bind("192.0.2.2:5432"))
        .unwrap()
        .unwrap();
    let connect =
        |from: &Namespace, to: &str| from.run(|| TcpStream::connect(to)).unwrap().unwrap();
    let mut client = connect(&net.client, "192.0.2.1:8080");
    let (mut server, _) = listener.accept().unwrap();
    let mut outbound = connect(&net.container, "192.0.2.2:5432");
    let (mut database, _) = outside.accept().unwrap();
    within(&net.host, async || {
        let hold = Hold::start(spec()).await.unwrap();
        client.write_all(b"request").unwrap();
        database.write_all(b"rows").unwrap();
        let connecting = thread::spawn({
            let client = net.client.clone();
            move || {
                client
                    .run(|| TcpStream::connect("192.0.2.1:8080"))
                    .unwrap()
                    .unwrap()
            }
        });
        until("data of both and a SYN are held", || hold.held() >= 3);
        for (stream, what) in [(&server, "inbound"), (&outbound, "outbound")] {
            stream.set_nonblocking(true).unwrap();
            let mut stream = stream;
            assert!(stream.read(&mut [0; 8]).is_err(), "{what} data got through");
            stream.set_nonblocking(false).unwrap();
        }
        assert!(!connecting.is_finished());
        let table = Table::open(&net.host).unwrap();
        let fresh = table.dump_container(address("10.88.0.5")).await.unwrap();
        assert_eq!(fresh.len(), 2, "a held SYN has no entry yet");
        release(hold, To::Source).await;
        let mut buffer = [0; 7];
        server.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"request");
        outbound.read_exact(&mut buffer[..4]).unwrap();
        assert_eq!(&buffer[..4], b"rows");
        let (mut accepted, _) = listener.accept().unwrap();
        let mut connected = connecting.join().unwrap();
        connected.write_all(b"hello").unwrap();
        accepted.read_exact(&mut buffer[..5]).unwrap();
        server.write_all(b"answer").unwrap();
        client.read_exact(&mut buffer[..6]).unwrap();
    });
}

/// A datagram from the copy of the container at the other host, through the hop, to the client.
async fn the_copy_speaks(net: &Net, to: To) -> (hold::HoldReport, Option<SocketAddr>) {
    let server = udp(&net.container, "0.0.0.0:80");
    let client = udp(&net.client, "192.0.2.2:5000");
    send(&client, 1, "192.0.2.1:8080");
    number(&server);
    steer::install(hop(3)).await.unwrap();
    let table = Table::open(&net.host).unwrap();
    let entry = table
        .dump_container(address("10.88.0.5"))
        .await
        .unwrap()
        .remove(0);
    let flow = entry.flow_of(address("10.88.0.5")).unwrap();

    let hold = Hold::start(spec()).await.unwrap();
    within(&net.other, async || {
        steer::install(hop(1)).await.unwrap();
        let there = Table::open(&net.other).unwrap();
        there.insert(&flow.at_destination(hop(1))).await.unwrap();
    });
    let copy = udp(&net.copy, "0.0.0.0:80");
    send(&copy, 7, "192.0.2.2:5000");
    send(&client, 8, "192.0.2.1:8080");
    until("both are held", || hold.held() == 2);
    let (mark, mask) = flow.steering((to == To::Destination).then(|| hop(3)));
    table.set_mark(&entry.original, mark, mask).await.unwrap();
    let report = release(hold, to).await;
    let receiver = if to == To::Destination {
        &copy
    } else {
        &server
    };
    assert_eq!(number(receiver), 8);
    client
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let from = client.recv_from(&mut [0; 16]).ok().map(|(_, from)| from);
    (report, from)
}

#[test]
fn what_the_copy_says_goes_out_when_the_container_has_moved() {
    let net = Net::new();
    within(&net.host, async || {
        let (report, from) = the_copy_speaks(&net, To::Destination).await;
        assert_eq!((report.released, report.discarded), (2, 0));
        assert_eq!(from, Some("192.0.2.1:8080".parse().unwrap()));
    });
}

#[test]
fn what_the_copy_says_is_dropped_when_the_container_stays() {
    let net = Net::new();
    within(&net.host, async || {
        let (report, from) = the_copy_speaks(&net, To::Source).await;
        assert_eq!((report.released, report.discarded), (1, 1));
        assert_eq!(from, None);
    });
}

#[test]
fn a_dropped_hold_releases_and_a_bound_is_kept() {
    let net = Net::new();
    let before = net.ruleset("host");
    let server = udp(&net.container, "0.0.0.0:80");
    let client = udp(&net.client, "192.0.2.2:5000");
    within(&net.host, async || {
        let hold = Hold::start(HoldSpec {
            packets: 10,
            ..spec()
        })
        .await
        .unwrap();
        let taken = Hold::start(spec()).await.unwrap_err();
        assert!(
            taken.to_string().contains("used by another process"),
            "{taken}"
        );
        for n in 0..20 {
            send(&client, n, "192.0.2.1:8080");
        }
        until("the bound is reached", || hold.held() == 10);
        drop(hold);
        for n in 0..10 {
            assert_eq!(number(&server), n);
        }
        assert_eq!(net.ruleset("host"), before);
        let hold = Hold::start(HoldSpec {
            packets: 10,
            ..spec()
        })
        .await
        .unwrap();
        for n in 0..20 {
            send(&client, n, "192.0.2.1:8080");
        }
        until("the bound is reached", || hold.held() == 10);
        let report = release(hold, To::Source).await;
        assert_eq!(
            (report.released, report.dropped_by_bound, report.peak),
            (10, 10, 10)
        );
    });
}

#[test]
fn rules_that_a_dead_process_left_let_packets_pass_and_are_removed() {
    let net = Net::new();
    let before = net.ruleset("host");
    let server = udp(&net.container, "0.0.0.0:80");
    let client = udp(&net.client, "192.0.2.2:5000");
    within(&net.host, async || {
        hold::remove_rules(&spec()).await.unwrap();
        steer::install(hop(3)).await.unwrap();
        let steering = net.ruleset("host");
        // As if the process had died: the rules are there, nobody listens to the queue.
        let hold = Hold::start(spec()).await.unwrap();
        let rules = net.at("host", "nft list table inet livemig");
        release(hold, To::Source).await;
        assert_eq!(net.ruleset("host"), steering);
        assert!(rules.contains("bypass"), "{rules}");
        let unlistened = Hold::start(spec()).await.unwrap();
        hold::remove_rules(&spec()).await.unwrap();
        assert_eq!(net.ruleset("host"), steering);
        send(&client, 5, "192.0.2.1:8080");
        assert_eq!(number(&server), 5);
        let report = release(unlistened, To::Source).await;
        assert_eq!(report.held, 0);
        steer::remove(hop(3)).await.unwrap();
        assert_eq!(net.ruleset("host"), before);
    });
}

#[test]
fn newcomers_wait_before_everybody_does() {
    let net = Net::new();
    let server = udp(&net.container, "0.0.0.0:80");
    let known = udp(&net.client, "192.0.2.2:5000");
    let unknown = udp(&net.client, "192.0.2.2:5001");
    send(&known, 0, "192.0.2.1:8080");
    assert_eq!(number(&server), 0);
    within(&net.host, async || {
        let reserved = Reserved::of_number(QUEUE).unwrap();
        let mut hold = reserved.prepare(spec()).await.unwrap();
        send(&unknown, 1, "192.0.2.1:8081");
        send(&known, 2, "192.0.2.1:8080");
        assert_eq!(number(&server), 2);
        assert_eq!((hold.held(), hold.since()), (0, None));
        hold.hold_newcomers().unwrap();
        send(&unknown, 3, "192.0.2.1:8080");
        until("the newcomer waits", || hold.held() == 1);
        // Its peer has never answered, so conntrack calls this one new, too.
        send(&known, 4, "192.0.2.1:8080");
        assert_eq!(number(&server), 4);
        hold.hold_all().unwrap();
        assert!(hold.since().is_some());
        send(&known, 5, "192.0.2.1:8080");
        until("all wait", || hold.held() == 2);
        let report = release(hold, To::Source).await;
        assert_eq!((number(&server), number(&server)), (3, 5));
        assert_eq!(report.released, 2);
    });
}

#[test]
fn a_bound_in_bytes_is_kept_and_reaching_it_is_told() {
    let net = Net::new();
    let server = udp(&net.container, "0.0.0.0:80");
    let client = udp(&net.client, "192.0.2.2:5000");
    // 20 bytes of IPv4, 8 of UDP, 16 of the datagram.
    const SIZE: u64 = 44;
    within(&net.host, async || {
        let hold = Hold::start(HoldSpec {
            bytes: 10 * SIZE + 1,
            ..spec()
        })
        .await
        .unwrap();
        let full = hold.full();
        for n in 0..10 {
            send(&client, n, "192.0.2.1:8080");
        }
        until("as many as fit are held", || hold.held() == 10);
        assert!(!full.is_cancelled(), "there is room for one byte");
        for n in 10..20 {
            send(&client, n, "192.0.2.1:8080");
        }
        until("the bound is told", || full.is_cancelled());
        let report = release(hold, To::Source).await;
        assert_eq!(
            (report.held, report.released, report.dropped_by_bound),
            (10, 10, 10)
        );
        assert_eq!((report.peak, report.peak_bytes), (10, 10 * SIZE));
        for n in 0..10 {
            assert_eq!(number(&server), n);
        }
        let hold = Hold::start(HoldSpec {
            packets: 3,
            ..spec()
        })
        .await
        .unwrap();
        for n in 0..3 {
            send(&client, n, "192.0.2.1:8080");
        }
        until("the bound in packets is told", || {
            hold.full().is_cancelled()
        });
        release(hold, To::Source).await;
    });
}

#[test]
fn queues_are_reserved_by_one_each_however_many_want_one() {
    let net = Net::new();
    let reserved: Vec<Vec<Reserved>> = thread::scope(|scope| {
        let reserving: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let some = || (0..8).map(|_| Reserved::first_free().unwrap()).collect();
                    net.host.run(some).unwrap()
                })
            })
            .collect();
        let joined = reserving.into_iter().map(|it| it.join().unwrap());
        joined.collect()
    });
    let numbers = |reserved: &[Vec<Reserved>]| {
        let all = reserved.iter().flatten().map(Reserved::queue);
        all.collect::<std::collections::BTreeSet<u16>>()
    };
    let taken = numbers(&reserved);
    assert_eq!(taken.len(), 64);
    drop(reserved);
    until("the first is free again", || {
        let again = net.host.run(|| Reserved::first_free().unwrap()).unwrap();
        taken.first() == Some(&again.queue())
    });
}

#[test]
fn two_holds_at_once_keep_apart() {
    let net = Net::new();
    let before = net.ruleset("host");
    let server = udp(&net.container, "0.0.0.0:80");
    let client = udp(&net.client, "192.0.2.2:5000");
    let six = udp(&net.client, "[2001:db8::2]:5006");
    let server6 = udp(&net.container, "[fd00:88::5]:80");
    send(&client, 0, "192.0.2.1:8080");
    send(&six, 0, "[2001:db8::1]:8080");
    assert_eq!((number(&server), number(&server6)), (0, 0));
    within(&net.host, async || {
        let mut holds = Vec::new();
        for container in ["10.88.0.5", "fd00:88::5"] {
            let reserved = Reserved::first_free().unwrap();
            let spec = HoldSpec::new(reserved.queue(), vec![address(container)]);
            let mut hold = reserved.prepare(spec).await.unwrap();
            hold.hold_all().unwrap();
            holds.push(hold);
        }
        for n in 1..=5 {
            send(&client, n, "192.0.2.1:8080");
            send(&six, n, "[2001:db8::1]:8080");
        }
        until("all is held", || holds.iter().all(|hold| hold.held() == 5));
        let [four, six] = <[Hold; 2]>::try_from(holds).unwrap();
        assert_eq!(release(six, To::Source).await.released, 5);
        for n in 1..=5 {
            assert_eq!(number(&server6), n);
        }
        assert_eq!(four.held(), 5);
        assert_eq!(release(four, To::Source).await.released, 5);
        for n in 1..=5 {
            assert_eq!(number(&server), n);
        }
        assert_eq!(net.ruleset("host"), before);
    });
}

#[test]
fn tcp_goes_at_once_and_datagrams_follow_at_their_pace_and_in_order() {
    const HELD: u32 = 400;
    const LATER: u32 = 100;
    let net = Net::new();
    let server = udp(&net.container, "0.0.0.0:80");
    let client = udp(&net.client, "192.0.2.2:5000");
    let listener = net.container.run(|| TcpListener::bind("0.0.0.0:80"));
    let listener = listener.unwrap().unwrap();
    let stream = net.client.run(|| TcpStream::connect("192.0.2.1:8080"));
    let mut stream = stream.unwrap().unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    send(&client, 0, "192.0.2.1:8080");
    assert_eq!(number(&server), 0);
    let got = AtomicU32::new(0);
    within(&net.host, async || {
        let hold = Hold::start(spec()).await.unwrap();
        // Data in the middle of the datagrams, in several segments.
        stream.set_nodelay(true).unwrap();
        for n in 1..=HELD {
            send(&client, n, "192.0.2.1:8080");
            if n % 100 == 50 {
                stream.write_all(&n.to_be_bytes()).unwrap();
            }
        }
        until("all is held", || hold.held() >= u64::from(HELD) + 4);
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                (0..HELD + LATER)
                    .map(|_| {
                        got.fetch_add(1, Ordering::Relaxed);
                        number(&server)
                    })
                    .collect::<Vec<_>>()
            });
            let sender = scope.spawn(|| {
                until("the release is under way", || {
                    got.load(Ordering::Relaxed) > 20
                });
                for n in 1..=LATER {
                    send(&client, HELD + n, "192.0.2.1:8080");
                }
            });
            let connection = scope.spawn(|| {
                let mut data = [0; 16];
                accepted.read_exact(&mut data).unwrap();
                let words = data.chunks(4);
                let words = words.map(|word| u32::from_be_bytes(word.try_into().unwrap()));
                (words.collect::<Vec<_>>(), got.load(Ordering::Relaxed))
            });
            let pace = Pace::Rate(Rate {
                times: 1,
                floor: 300,
            });
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let report = scope
                .spawn(move || {
                    runtime.block_on(async {
                        let released = hold.release(To::Source, pace).await.unwrap();
                        released.clear().await.unwrap()
                    })
                })
                .join()
                .unwrap();
            sender.join().unwrap();
            let (data, before) = connection.join().unwrap();
            assert_eq!(data, [50, 150, 250, 350]);
            assert!(before < HELD, "{before} datagrams came before the data");
            assert_eq!(
                reader.join().unwrap(),
                (1..=HELD + LATER).collect::<Vec<_>>()
            );
            assert_eq!(report.released, report.held, "{report:?}");
            assert!(!report.gave_up_pace);
        });
    });
}

/// Reads so many datagrams slowly: a portion, then a pause.
fn read_slowly(server: &UdpSocket, count: u32) -> thread::JoinHandle<Vec<u32>> {
    let server = server.try_clone().unwrap();
    server
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    thread::spawn(move || {
        let mut got = Vec::new();
        let mut buffer = [0; 16];
        while (got.len() as u32) < count && server.recv(&mut buffer).is_ok() {
            got.push(u32::from_be_bytes(buffer[..4].try_into().unwrap()));
            if got.len() % 50 == 0 {
                thread::sleep(Duration::from_millis(5));
            }
        }
        got
    })
}

#[test]
fn datagrams_are_let_in_as_a_slow_socket_takes_them() {
    // A default receive buffer holds a tenth of it.
    const COUNT: u32 = 3000;
    let net = Net::new();
    let server = udp(&net.container, "0.0.0.0:80");
    // One that nobody reads is not waited for.
    let unread = udp(&net.container, "0.0.0.0:81");
    let client = udp(&net.client, "192.0.2.2:5000");
    send(&client, 0, "192.0.2.1:8080");
    assert_eq!(number(&server), 0);
    for n in 0..1000 {
        send(&udp(&net.container, "127.0.0.1:0"), n, "127.0.0.1:81");
    }
    within(&net.host, async || {
        let hold = Hold::start(spec()).await.unwrap();
        for n in 1..=COUNT {
            send(&client, n, "192.0.2.1:8080");
        }
        until("all is held", || hold.held() == u64::from(COUNT));
        let reader = read_slowly(&server, COUNT);
        let pace = Pace::Sockets(net.container.clone());
        let released = hold.release(To::Source, pace).await.unwrap();
        let report = released.clear().await.unwrap();
        println!("{report:?}");
        assert_eq!(reader.join().unwrap(), (1..=COUNT).collect::<Vec<_>>());
    });
    drop(unread);
}

#[test]
fn what_comes_out_of_a_hop_waits_for_the_container_that_arrives() {
    const COUNT: u32 = 3000;
    let net = Net::new();
    let before = net.ruleset("other");
    let server = udp(&net.container, "0.0.0.0:80");
    let client = udp(&net.client, "192.0.2.2:5000");
    send(&client, 0, "192.0.2.1:8080");
    number(&server);
    let flow = within(&net.host, async || {
        steer::install(hop(3)).await.unwrap();
        let table = Table::open(&net.host).unwrap();
        let entries = table.dump_container(address("10.88.0.5")).await.unwrap();
        let flow = entries[0].flow_of(address("10.88.0.5")).unwrap();
        let (mark, mask) = flow.steering(Some(hop(3)));
        table
            .set_mark(&flow.entry.original, mark, mask)
            .await
            .unwrap();
        flow
    });
    within(&net.other, async || {
        steer::install(hop(1)).await.unwrap();
        let there = Table::open(&net.other).unwrap();
        there.insert(&flow.at_destination(hop(1))).await.unwrap();
        let reserved = Reserved::first_free().unwrap();
        let spec = HoldSpec {
            side: Side::Arriving,
            ..HoldSpec::new(reserved.queue(), vec![address("10.88.0.5")])
        };
        let intake = Intake::start(reserved, spec).await.unwrap();
        for n in 1..=COUNT {
            send(&client, n, "192.0.2.1:8080");
        }
        until("all wait", || intake.held() == u64::from(COUNT));
        let copy = udp(&net.copy, "0.0.0.0:80");
        let reader = read_slowly(&copy, COUNT + 1);
        intake.open(&net.copy);
        until("some have gone", || !reader.is_finished());
        send(&client, COUNT + 1, "192.0.2.1:8080");
        let report = intake.finish().await.unwrap().clear().await.unwrap();
        println!("{report:?}");
        assert_eq!(reader.join().unwrap(), (1..=COUNT + 1).collect::<Vec<_>>());
        assert_eq!(report.held, report.released);
        steer::remove(hop(1)).await.unwrap();
    });
    assert_eq!(net.ruleset("other"), before);
}
