//! Hops between hosts that are network namespaces of this test: A - router - B, where the link
//! between the router and B carries 1,400 bytes only and nobody lets ICMP through.

use std::future::Future;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread::JoinHandle;

use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery};
use tempfile::TempDir;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);
const ADDRESS_A: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const ADDRESS_B: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));

/// Not a test: what the helper of these tests runs as a device process.
#[test]
fn device_process() {
    let (Ok(interface), Ok(socket)) = (
        std::env::var("LIVEMIG_TEST_INTERFACE"),
        std::env::var("LIVEMIG_TEST_SOCKET"),
    ) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    if let Err(error) = runtime.block_on(userspace::run_device(&interface, Path::new(&socket))) {
        eprintln!("{error}");
        std::process::exit(1);
    }
    std::process::exit(0);
}

/// A program that turns the arguments of a device process into a call of [`device_process`].
fn helper(directory: &Path) -> PathBuf {
    let path = directory.join("helper");
    // Written by another process: a descriptor of ours that is open for writing might be inherited
    // by a child of another test, and the script could not be executed then (ETXTBSY).
    let script = format!(
        "cat > {path} <<'END'\n#!/bin/sh\n[ \"$1\" = {DEVICE} ] || exit 2\n\
         LIVEMIG_TEST_INTERFACE=$2 LIVEMIG_TEST_SOCKET=$3 exec {exe} --exact \
         tunnel::tests::device_process --nocapture\nEND\nchmod 755 {path}",
        path = path.display(),
        DEVICE = userspace::DEVICE_COMMAND,
        exe = std::env::current_exe().unwrap().display(),
    );
    assert!(
        Command::new("sh")
            .arg("-c")
            .arg(script)
            .status()
            .unwrap()
            .success()
    );
    path
}

type Job = Box<dyn FnOnce(&tokio::runtime::Runtime) + Send>;

/// A thread in a network namespace of its own, and the hops that it makes.
struct Host {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// By which `ip` can find the namespace.
    id: i32,
    tunnels: Tunnels,
    directory: TempDir,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (jobs, inbox) = mpsc::channel::<Job>();
        let (ready, started) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            // SAFETY: this thread shares the network namespace with nothing that relies on it: it
            // has no sockets yet.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
                .expect("network namespaces need root");
            ready
                .send(rustix::thread::gettid().as_raw_nonzero().get())
                .unwrap();
            // One thread, or its helpers would not be in the namespace: they are started by it.
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            for job in inbox {
                job(&runtime);
            }
        });
        let id = started.recv().unwrap();
        let settings = Settings {
            uapi_directory: directory.path().join("wireguard"),
            backend: Some(Backend::Userspace),
            ..Settings::new(directory.path().join("hops"), helper(directory.path()))
        };
        let host = Self {
            jobs: Some(jobs),
            thread: Some(thread),
            id,
            tunnels: Tunnels::new(settings),
            directory,
        };
        host.sh(
            "ip link set lo up; sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=1",
        );
        host
    }

    /// Runs something in the host's namespace.
    fn on<T, F>(&self, work: impl FnOnce(Tunnels) -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T>,
    {
        let tunnels = self.tunnels.clone();
        let (answer, result) = mpsc::channel();
        let job: Job = Box::new(move |runtime| {
            let _ = answer.send(runtime.block_on(work(tunnels)));
        });
        self.jobs.as_ref().unwrap().send(job).unwrap();
        result.recv().expect("the host's thread panicked")
    }

    fn sh(&self, script: &str) -> String {
        let script = script.to_owned();
        self.on(async move |_| {
            let output = Command::new("sh").args(["-ec", &script]).output().unwrap();
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{script}: {errors}");
            String::from_utf8(output.stdout).unwrap()
        })
    }

    /// A hop to that peer, opened.
    fn open(&self, peer: &str, mtu: u16) -> (HopId, Proposal) {
        let peer = peer.to_owned();
        self.on(async move |tunnels| {
            let (hop, _) = tunnels.acquire(&peer, "test").unwrap();
            let proposal = tunnels.open(hop.spec.hop, mtu).await.unwrap();
            (hop.spec.hop, proposal)
        })
    }

    fn connect(&self, hop: HopId, peer: &Proposal, address: IpAddr) -> Hop {
        let peer = peer.clone();
        self.on(async move |tunnels| tunnels.connect(hop, &peer, address).await.unwrap())
    }

    fn verify(&self, hop: HopId) {
        self.on(async move |tunnels| tunnels.verify(hop, PATIENCE).await.unwrap());
    }

    fn verify_full_size(&self, hop: HopId) {
        self.on(async move |tunnels| tunnels.verify_full_size(hop, PATIENCE).await.unwrap());
    }

    fn record(&self, hop: HopId) -> Hop {
        self.tunnels.registry().get(hop).unwrap().unwrap()
    }

    /// All that a hop could leave behind.
    fn state(&self) -> String {
        let directory = self.directory.path().display();
        self.sh(&format!(
            "ip -d link; ip addr; ip rule; ip -6 rule; ip route show table all; \
             ip -6 route show table all; find {directory} ! -name '*.lock' ! -name hops ! -name wireguard"
        ))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Also after a failed test: no process of ours stays behind.
        for hop in self.tunnels.registry().list().unwrap_or_default() {
            let (done, result) = mpsc::channel();
            let tunnels = self.tunnels.clone();
            let job: Job = Box::new(move |runtime| {
                let _ = done.send(runtime.block_on(tunnels.down(&hop.spec)));
            });
            if self
                .jobs
                .as_ref()
                .is_some_and(|jobs| jobs.send(job).is_ok())
            {
                let _ = result.recv();
            }
        }
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Two hosts with a router between them, which must outlive them.
fn hosts() -> (Host, Host, Host) {
    let (a, b, router) = (Host::new(), Host::new(), Host::new());
    let tie = |host: &Host, name: &str, mtu: u16, address: &str, gateway: &str| {
        router.sh(&format!(
            "ip link add {name} mtu {mtu} type veth peer name up0 mtu {mtu} netns {}; \
             ip addr add {gateway}/24 dev {name}; ip link set {name} up",
            host.id
        ));
        host.sh(&format!(
            "ip addr add {address}/24 dev up0; ip link set up0 up; \
             ip route add default via {gateway}; sysctl -qw net.ipv4.conf.up0.rp_filter=1"
        ));
    };
    // The kernel switches links and their own IPv6 addresses on behind our back.
    let settled = |host: &Host| {
        let begin = Instant::now();
        while host.sh("ip link; ip -6 addr").contains("NO-CARRIER")
            || host.sh("ip -6 addr").contains("tentative")
        {
            assert!(begin.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    tie(&a, "to-a", 1500, "192.0.2.1", "192.0.2.254");
    tie(&b, "to-b", 1400, "198.51.100.1", "198.51.100.254");
    for host in [&a, &b, &router] {
        settled(host);
        host.sh(
            "nft 'add table inet test; add chain inet test in { type filter hook prerouting priority 0; }; \
             add rule inet test in meta l4proto { icmp, icmpv6 } drop; \
             add chain inet test out { type filter hook postrouting priority 0; }; \
             add rule inet test out meta l4proto { icmp, icmpv6 } drop'",
        );
    }
    (a, b, router)
}

/// A hop between the two, its numbers on A and on B.
fn join(a: &Host, b: &Host) -> (HopId, HopId) {
    let (hop_a, from_a) = a.open("b", 1500);
    let (hop_b, from_b) = b.open("a", 1500);
    b.connect(hop_b, &from_a, ADDRESS_A);
    a.connect(hop_a, &from_b, ADDRESS_B);
    a.verify(hop_a);
    b.verify_full_size(hop_b);
    b.verify(hop_b);
    a.verify_full_size(hop_a);
    (hop_a, hop_b)
}

/// An agent that listens for both families has its callers' IPv4 addresses within IPv6 ones.
#[test]
fn the_same_peer_is_the_same_however_its_address_is_written() {
    let (a, b, _router) = hosts();
    let (hop_a, hop_b) = join(&a, &b);
    let before = a.record(hop_a);
    let theirs = b.record(hop_b).proposal.unwrap();
    let IpAddr::V4(address) = ADDRESS_B else {
        unreachable!("it is an IPv4 address")
    };
    let again = a.connect(hop_a, &theirs, address.to_ipv6_mapped().into());
    // With another endpoint it would be another peer, and its session would begin anew.
    assert_eq!(again, before);
}

#[test]
fn a_mark_is_seen_where_the_hop_ends_and_no_other() {
    let (a, b, _router) = hosts();
    let (hop_a, hop_b) = join(&a, &b);
    let awaited = b.on(async move |tunnels| tunnels.await_mark(hop_b, "0123").unwrap());
    let send = |mark: &'static str| {
        a.on(async move |tunnels| {
            tunnels
                .send_mark(hop_a, mark, Duration::ZERO)
                .await
                .unwrap()
        });
    };
    send("0124");
    let (awaited, came) = b.on(async move |_| {
        let came = awaited.came(Duration::from_millis(100)).await;
        (awaited, came)
    });
    assert!(!came);
    send("0123");
    assert!(b.on(async move |_| awaited.came(PATIENCE).await));
}

/// A UDP socket whose packets carry the mark of a hop, and must arrive whole or not at all.
fn marked(hop: HopId, v6: bool) -> UdpSocket {
    let socket = UdpSocket::bind(if v6 { "[::]:0" } else { "0.0.0.0:0" }).unwrap();
    mark(&socket, hop);
    if !v6 {
        sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DO).unwrap();
    }
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// SO_MARK, which nothing in the tree has a call for.
fn mark(socket: &impl std::os::fd::AsRawFd, hop: HopId) {
    unsafe extern "C" {
        fn setsockopt(fd: i32, level: i32, name: i32, value: *const u32, length: u32) -> i32;
    }
    const SOL_SOCKET: i32 = 1;
    const SO_MARK: i32 = 36;
    let value = hop.packet_mark();
    // SAFETY: the descriptor is open, and the value lives through the call with its right length.
    let result = unsafe { setsockopt(socket.as_raw_fd(), SOL_SOCKET, SO_MARK, &value, 4) };
    assert_eq!(result, 0);
}

/// A TCP connection by way of a hop: the mark has to be on the socket before it connects.
fn connect_marked(hop: HopId, to: SocketAddr) -> std::net::TcpStream {
    let socket: OwnedFd = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    mark(&socket, hop);
    rustix::net::connect(&socket, &to).unwrap();
    socket.into()
}

#[test]
fn marked_packets_take_the_hop_in_both_families_and_both_directions() {
    let (a, b, _router) = hosts();
    let (hop_a, hop_b) = join(&a, &b);
    let ends = a.record(hop_a).connection.unwrap();
    // Addresses that no route but the hop's leads to.
    b.sh("ip addr add 203.0.113.9/32 dev lo; ip addr add 2001:db8:b::9/128 dev lo nodad");
    a.sh("ip addr add 203.0.113.8/32 dev lo; ip addr add 2001:db8:a::8/128 dev lo nodad");

    for (from, hop, to, address) in [
        (&a, hop_a, &b, "203.0.113.9"),
        (&a, hop_a, &b, "2001:db8:b::9"),
        (&b, hop_b, &a, "203.0.113.8"),
        (&b, hop_b, &a, "2001:db8:a::8"),
    ] {
        let address: IpAddr = address.parse().unwrap();
        let receiver = to.on(async move |_| UdpSocket::bind((address, 7000)).unwrap());
        receiver
            .set_read_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        // 1,500 bytes with the headers, which do not fit the link between the hosts, and 1,400,
        // which fit the first part of it once they are encrypted but not the second.
        let full = if address.is_ipv6() { 1452 } else { 1472 };
        let sender = from.on(async move |_| marked(hop, address.is_ipv6()));
        let mut buffer = [0; 2000];
        // A datagram may get lost on a busy machine; what matters is that its size gets through.
        let mut get_through = |size: usize| {
            for _ in 0..PATIENCE.as_secs() {
                sender.send_to(&vec![0x5a; size], (address, 7000)).unwrap();
                while let Ok((length, source)) = receiver.recv_from(&mut buffer) {
                    if length == size {
                        return source;
                    }
                }
            }
            panic!("no datagram of {size} bytes came through to {address}");
        };
        let source = get_through(full);
        get_through(full - 100);
        let pair = if address.is_ipv6() { ends.v6 } else { ends.v4 }.unwrap();
        assert!([pair.local, pair.peer].contains(&source.ip()), "{source}");
        // The answer goes to a tunnel address, which is on the link: no mark is needed.
        to.on(async move |_| receiver.send_to(b"pong", source).unwrap());
        let (length, _) = sender.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"pong");
    }

    let status = a.on(async move |tunnels| tunnels.status(hop_a).await.unwrap());
    assert!(
        status.rx_bytes > 3000 && status.tx_bytes > 3000,
        "{status:?}"
    );
    assert!(status.last_handshake.unwrap().elapsed().unwrap() < PATIENCE);
}

#[test]
fn bulk_data_with_full_size_segments_goes_both_ways_where_icmp_is_filtered() {
    let (a, b, _router) = hosts();
    let (hop_a, _) = join(&a, &b);
    b.sh("ip addr add 203.0.113.9/32 dev lo");
    let listener = b.on(async |_| TcpListener::bind("203.0.113.9:7000").unwrap());
    let client = a.on(async move |_| connect_marked(hop_a, "203.0.113.9:7000".parse().unwrap()));
    let (server, _) = listener.accept().unwrap();
    // Neither kernel may have made its segments smaller: 1,460 bytes, or 1,448 beside timestamps.
    for socket in [&client, &server] {
        assert!(segment_size(socket) >= 1448, "{}", segment_size(socket));
    }
    const SIZE: usize = 8 << 20;
    std::thread::scope(|scope| {
        for (mut from, mut to) in [(&client, &server), (&server, &client)] {
            from.set_write_timeout(Some(PATIENCE)).unwrap();
            to.set_read_timeout(Some(PATIENCE)).unwrap();
            scope.spawn(move || from.write_all(&vec![0xa5; SIZE]).unwrap());
            scope.spawn(move || {
                let mut all = vec![0; SIZE];
                to.read_exact(&mut all).unwrap();
                assert!(all.iter().all(|byte| *byte == 0xa5));
            });
        }
    });
    for socket in [&client, &server] {
        assert!(segment_size(socket) >= 1448, "{}", segment_size(socket));
    }
}

#[test]
fn a_burst_of_small_packets_arrives_complete_and_in_order() {
    const COUNT: u32 = 20_000;
    let (a, b, _router) = hosts();
    let (hop_a, _) = join(&a, &b);
    b.sh("ip addr add 203.0.113.9/32 dev lo; ip addr add 2001:db8:b::9/128 dev lo nodad");
    for address in ["203.0.113.9", "2001:db8:b::9"] {
        let address: IpAddr = address.parse().unwrap();
        let receiver = b.on(async move |_| UdpSocket::bind((address, 7000)).unwrap());
        // Each counts with less than a KiB there.
        sockopt::set_socket_recv_buffer_size_force(&receiver, 32 << 20).unwrap();
        receiver.set_read_timeout(Some(PATIENCE)).unwrap();
        let sender = a.on(async move |_| marked(hop_a, address.is_ipv6()));
        for number in 0..COUNT {
            // Of several sizes, of which some can be sent together.
            let mut payload = vec![0; 16 + (number as usize / 100 % 3) * 20 + number as usize % 2];
            payload[..4].copy_from_slice(&number.to_be_bytes());
            sender.send_to(&payload, (address, 7000)).unwrap();
        }
        let mut buffer = [0; 100];
        for number in 0..COUNT {
            let (length, _) = receiver
                .recv_from(&mut buffer)
                .unwrap_or_else(|error| panic!("{number} of {COUNT} came to {address}: {error}"));
            assert_eq!(u32::from_be_bytes(buffer[..4].try_into().unwrap()), number);
            assert_eq!(
                length,
                16 + (number as usize / 100 % 3) * 20 + number as usize % 2
            );
        }
    }
}

#[test]
fn datagrams_sent_in_one_call_arrive_one_by_one() {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

    let (a, b, _router) = hosts();
    let (hop_a, _) = join(&a, &b);
    b.sh("ip addr add 203.0.113.9/32 dev lo; ip addr add 2001:db8:b::9/128 dev lo nodad");
    let data: Vec<u8> = (0..100).collect();
    for address in ["203.0.113.9", "2001:db8:b::9"] {
        let address: IpAddr = address.parse().unwrap();
        let receiver = b.on(async move |_| UdpSocket::bind((address, 7000)).unwrap());
        receiver.set_read_timeout(Some(PATIENCE)).unwrap();
        let sender = a.on(async move |_| marked(hop_a, address.is_ipv6()));
        sender.connect((address, 7000)).unwrap();
        let sent = sendmsg::<()>(
            sender.as_raw_fd(),
            &[std::io::IoSlice::new(&data)],
            &[ControlMessage::UdpGsoSegments(&30)],
            MsgFlags::empty(),
            None,
        );
        assert_eq!(sent, Ok(100));
        for part in data.chunks(30) {
            let mut buffer = [0; 200];
            let length = receiver.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], part);
        }
    }
}

/// TCP_MAXSEG: the size of the segments that the socket sends.
fn segment_size(socket: &std::net::TcpStream) -> u32 {
    unsafe extern "C" {
        fn getsockopt(fd: i32, level: i32, name: i32, value: *mut u32, length: *mut u32) -> i32;
    }
    let (mut value, mut length) = (0, 4);
    // SAFETY: the descriptor is open, and both pointers are to live values of the right size.
    let result = unsafe { getsockopt(socket.as_raw_fd(), 6, 2, &mut value, &mut length) };
    assert_eq!(result, 0);
    value
}

#[test]
fn packets_as_large_as_the_device_takes_go_over_ipv6() {
    let (a, b) = (Host::new(), Host::new());
    a.sh(&format!(
        "ip link add up0 type veth peer name up0 netns {}; \
         ip addr add 2001:db8::1/64 dev up0 nodad; ip link set up0 up",
        b.id
    ));
    b.sh("ip addr add 2001:db8::2/64 dev up0 nodad; ip link set up0 up");
    let (hop_a, from_a) = a.open("b", 9000);
    let (hop_b, from_b) = b.open("a", 1500);
    b.connect(hop_b, &from_a, "2001:db8::1".parse().unwrap());
    a.connect(hop_a, &from_b, "2001:db8::2".parse().unwrap());
    // These look for packets of the size of the interface, which is what the device can take.
    a.verify(hop_a);
    b.verify_full_size(hop_b);
    b.verify(hop_b);
    a.verify_full_size(hop_a);
    for host in [&a, &b] {
        let mtu = format!("mtu {}", userspace::MAX_MTU);
        assert!(host.sh("ip link show livemig1").contains(&mtu));
    }
}

#[test]
fn nothing_is_left_of_a_hop() {
    let (a, b, _router) = hosts();
    let before = a.state();
    let (hop, _) = join(&a, &b);
    let during = a.state();
    assert!(
        during.contains("livemig1") && during.contains("7105793"),
        "{during}"
    );
    let record = a.record(hop);
    let device = record.device.unwrap();
    assert!(device.is_running());
    // A session of its own: field 6 of stat is the session, 4 after the name and the state.
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", device.pid)).unwrap();
    let session = stat[stat.rfind(')').unwrap() + 1..]
        .split_whitespace()
        .nth(3)
        .unwrap()
        .to_owned();
    assert_eq!(session, device.pid.to_string());

    let unused = a.on({
        let spec = record.spec.clone();
        async move |tunnels| tunnels.down_if_unused(&spec).await.unwrap()
    });
    assert!(!unused, "it has a user");
    assert!(a.tunnels.release(hop, "test").unwrap());
    for removed in [true, true, true] {
        let spec = record.spec.clone();
        let result = a.on(async move |tunnels| tunnels.down_if_unused(&spec).await.unwrap());
        assert_eq!(result, removed);
        assert_eq!(a.state(), before);
        assert!(!device.is_running());
    }
}

#[test]
fn a_hop_of_another_time_is_left_alone() {
    let a = Host::new();
    let (hop, _) = a.open("b", 1500);
    let old = a.record(hop).spec;
    let spec = old.clone();
    a.on(async move |tunnels| tunnels.down(&spec).await.unwrap());
    let (again, _) = a.open("c", 1500);
    assert_eq!(hop, again);
    a.on(async move |tunnels| tunnels.down(&old).await.unwrap());
    assert!(a.record(again).device.unwrap().is_running());
}

#[test]
fn a_wrong_key_is_told_within_the_time() {
    let (a, b, _router) = hosts();
    let (hop_a, from_a) = a.open("b", 1500);
    let (hop_b, from_b) = b.open("a", 1500);
    let wrong = Proposal {
        public_key: PrivateKey::generate().unwrap().public(),
        ..from_a
    };
    b.connect(hop_b, &wrong, ADDRESS_A);
    a.connect(hop_a, &from_b, ADDRESS_B);
    let begin = Instant::now();
    let error = a.on(async move |tunnels| {
        tunnels
            .verify(hop_a, Duration::from_millis(700))
            .await
            .unwrap_err()
    });
    assert!(begin.elapsed() < Duration::from_secs(3));
    assert!(matches!(error, Error::NoHandshake { .. }), "{error}");
    assert!(error.to_string().contains("198.51.100.1:51820"), "{error}");
    let hint = error.hint().unwrap();
    assert!(hint.contains("UDP port 51820 of 198.51.100.1"), "{hint}");
    let error = b.on(async move |tunnels| {
        tunnels
            .verify_full_size(hop_b, Duration::from_millis(100))
            .await
            .unwrap_err()
    });
    assert!(
        matches!(error, Error::NoFullSize { received: 0, .. }),
        "{error}"
    );
}

#[test]
fn a_device_that_died_is_made_anew_and_its_peer_follows() {
    let (a, b, _router) = hosts();
    let (hop_a, hop_b) = join(&a, &b);
    let old = a.record(hop_a);
    let device = old.device.unwrap();
    let pid = rustix::process::Pid::from_raw(device.pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert!(a.on(async move |_| device.ended_within(PATIENCE).await));

    let (again, from_a) = a.open("b", 1500);
    assert_eq!(again, hop_a, "live connections carry this number");
    assert_ne!(from_a.public_key, old.proposal.unwrap().public_key);
    let (_, from_b) = b.open("a", 1500);
    b.connect(hop_b, &from_a, ADDRESS_A);
    a.connect(hop_a, &from_b, ADDRESS_B);
    a.verify(hop_a);
    let listed = a.sh("ip rule | grep -c 'lookup 7105793'; ip -6 rule | grep -c 'lookup 7105793'");
    assert_eq!(listed, "1\n1\n");
}

#[test]
fn doing_it_again_changes_nothing() {
    let (a, b, _router) = hosts();
    let (hop_a, hop_b) = join(&a, &b);
    let before = a.state();
    let handshake = a.on(async move |tunnels| tunnels.status(hop_a).await.unwrap());
    assert_eq!(join(&a, &b), (hop_a, hop_b));
    let after = a.on(async move |tunnels| tunnels.status(hop_a).await.unwrap());
    assert_eq!(a.state(), before);
    let drift = after
        .last_handshake
        .unwrap()
        .duration_since(handshake.last_handshake.unwrap())
        .unwrap_or_default();
    // The device reports it as "so long ago": the two differ by what the clocks moved meanwhile.
    assert!(
        drift < Duration::from_millis(500),
        "the session was replaced"
    );

    // A container with larger packets joins: both ends grow.
    let (_, from_a) = a.open("b", 2000);
    assert_eq!(from_a.mtu, 2000);
    b.connect(hop_b, &from_a, ADDRESS_A);
    for host in [&a, &b] {
        assert!(host.sh("ip link show livemig1").contains("mtu 2000"));
    }
    a.verify(hop_a);
    b.verify_full_size(hop_b);
}

#[test]
fn the_device_ends_with_its_interface() {
    let a = Host::new();
    let (hop, _) = a.open("b", 1500);
    let record = a.record(hop);
    assert!(record.spec.socket.exists());
    a.sh("ip link del livemig1");
    let device = record.device.unwrap();
    assert!(a.on(async move |_| device.ended_within(PATIENCE).await));
    assert!(!record.spec.socket.exists());
}

#[test]
fn the_process_is_found_by_its_socket_when_the_record_lacks_it() {
    let a = Host::new();
    let (hop, _) = a.open("b", 1500);
    let device = a.record(hop).device.unwrap();
    let record = a
        .tunnels
        .registry()
        .update(hop, |hop| hop.device = None)
        .unwrap();
    a.on(async move |tunnels| tunnels.down(&record.spec).await.unwrap());
    assert!(!device.is_running());
}

#[test]
fn a_port_in_use_is_passed_over() {
    let a = Host::new();
    let _taken = a.on(async |_| UdpSocket::bind(("0.0.0.0", Settings::FIRST_PORT)).unwrap());
    let (_, first) = a.open("b", 1500);
    let (_, second) = a.open("c", 1500);
    assert_eq!(first.listen_port, Settings::FIRST_PORT + 1);
    assert_eq!(second.listen_port, Settings::FIRST_PORT + 2);
}

#[test]
fn the_hosts_networks_are_told_to_the_peer() {
    let a = Host::new();
    a.sh(
        "ip link add br0 type bridge; ip link set br0 up; ip addr add 100.113.0.1/24 dev br0; \
          ip route add 198.18.0.0/16 dev br0; ip route add 10.213.4.0/24 dev br0 table 77",
    );
    let (_, proposal) = a.open("b", 1500);
    let networks: Vec<String> = proposal
        .taken
        .networks()
        .iter()
        .map(ToString::to_string)
        .collect();
    for network in ["198.18.0.0/16", "10.213.4.0/24"] {
        assert!(networks.contains(&network.to_owned()), "{networks:?}");
    }
    assert!(
        networks
            .iter()
            .any(|network| network.starts_with("100.113.0.")),
        "{networks:?}"
    );
}

#[test]
fn a_host_that_does_not_forward_is_told_so() {
    let a = Host::new();
    a.sh("sysctl -qw net.ipv4.ip_forward=0");
    let error = a.on(async |tunnels| {
        let (hop, _) = tunnels.acquire("b", "test").unwrap();
        tunnels.open(hop.spec.hop, 1500).await.unwrap_err()
    });
    assert!(
        error.hint().unwrap().contains("net.ipv4.ip_forward=1"),
        "{error}"
    );
}

#[test]
fn a_helper_that_fails_says_why_and_leaves_nothing() {
    let mut a = Host::new();
    let before = a.state();
    a.tunnels.settings.helper = "/bin/false".into();
    let (error, spec) = a.on(async |tunnels| {
        let (hop, _) = tunnels.acquire("b", "test").unwrap();
        (
            tunnels.open(hop.spec.hop, 1500).await.unwrap_err(),
            hop.spec,
        )
    });
    assert!(error.to_string().contains("exit status: 1"), "{error}");
    a.tunnels.settings.helper = "/nowhere/livemig".into();
    let hop = spec.hop;
    let error = a.on(async move |tunnels| tunnels.open(hop, 1500).await.unwrap_err());
    assert!(error.to_string().contains("/nowhere/livemig"), "{error}");

    // A device that cannot have its interface: the name is taken by one of another kind.
    a.tunnels.settings.helper = helper(a.directory.path());
    a.sh("ip link add livemig9 type bridge");
    let log = a.directory.path().join("log");
    let taken = HopSpec {
        interface: "livemig9".into(),
        ..spec.clone()
    };
    let error = a.on(async move |tunnels| {
        userspace::start(
            &tunnels.settings.helper,
            &taken,
            &log,
            userspace::START,
            |_| Ok(()),
        )
        .await
        .unwrap_err()
    });
    assert!(
        error.to_string().contains("livemig9 could not be created"),
        "{error}"
    );
    a.sh(&format!(
        "ip link del livemig9; rm {}",
        a.directory.path().join("log").display()
    ));

    a.on(async move |tunnels| tunnels.down(&spec).await.unwrap());
    assert_eq!(a.state(), before);
}

#[test]
fn two_at_once_open_one_interface() {
    let a = Host::new();
    let (one, two) = a.on(async |tunnels| {
        let (hop, _) = tunnels.acquire("b", "one").unwrap();
        let other = tunnels.clone();
        tokio::join!(
            tunnels.open(hop.spec.hop, 1500),
            other.open(hop.spec.hop, 1500)
        )
    });
    assert_eq!(one.unwrap(), two.unwrap());
}

#[test]
fn a_proposal_is_checked_where_it_comes_in() {
    let good = Proposal {
        public_key: PrivateKey::generate().unwrap().public(),
        listen_port: 51820,
        mtu: 1500,
        ipv6: true,
        taken: Taken::default(),
    };
    let text = serde_json::to_string(&good).unwrap();
    assert_eq!(serde_json::from_str::<Proposal>(&text).unwrap(), good);
    for (from, to) in [("51820", "0"), ("1500", "1279"), ("1500", "65500")] {
        assert!(
            serde_json::from_str::<Proposal>(&text.replace(from, to)).is_err(),
            "{to}"
        );
    }
}

#[test]
fn a_clock_that_was_set_forward_does_not_make_a_session_old() {
    const JUMP: Duration = Duration::from_secs(5 * 3600);
    let ago = |age: Duration| SystemTime::now() - age;
    let (young, old) = (Duration::from_secs(100), Duration::from_secs(200));
    assert!(super::is_fresh(ago(young), Duration::ZERO));
    assert!(!super::is_fresh(ago(old), Duration::ZERO));
    assert!(super::is_fresh(ago(JUMP + young), JUMP), "before the jump");
    assert!(super::is_fresh(ago(young), JUMP), "after it");
    assert!(!super::is_fresh(ago(JUMP + old), JUMP));
    assert!(super::host_started().is_some());
}
