//! The inputs to begin with: what the readers are meant to read.
//!
//! They are kept as files in `fuzz/corpus`, where libFuzzer wants them, together with what it found. When
//! a format changes they are written anew: `make fuzz-corpus`.

use bytes::Bytes;
use futures::{TryStreamExt, stream};
use neli::consts::nl::NlmF;
use serde_json::{Value, json};

use super::wait_for;
use crate::agent::{Invites, Limits, Offer};
use crate::bundle::{Compression, headed, send_as};
use crate::conntrack::{Entry, Mark, Protocol, Status, TcpInfo, TcpSide, TcpState, Tuple};
use crate::netlink::{Body, Request};
use crate::tunnel::HopId;

/// An input with a name.
pub(super) type Seed = (String, Vec<u8>);

const INSPECT: &str = include_str!("../migration/testdata/inspect.json");
const CONFIG: &str = include_str!("../migration/testdata/config.dump.json");
const SPEC: &str = include_str!("../migration/testdata/spec.dump.json");
const ID: &str = "3acb922cdf168ab56da23193fe9cba1f240ee420e6f60b79f2eaf39a506b3a62";
const FINGERPRINT: &str = "SHA256:q6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6s";

/// The inputs of a target.
pub(super) fn of(target: &str) -> Vec<Seed> {
    let seeds = match target {
        "conntrack" => conntrack(),
        "documents" => documents(),
        "fetch" => fetch(),
        "files" => files(),
        "header" => header(),
        "images" => images(),
        "netlink" => netlink(),
        "packets" => packets(),
        "pages" => pages(),
        "podman" => podman(),
        "protocol" => protocol(),
        "queue" => queue(),
        "runtime" => runtime(),
        "sockets" => sockets(),
        "stats" => stats(),
        "token" => token(),
        "transfer" => transfer(),
        "vetted" => vetted(0),
        "walker" => walker(),
        other => panic!("no seeds for {other}"),
    };
    let named = |(name, input): (&str, Vec<u8>)| (name.to_owned(), input);
    seeds.into_iter().map(named).collect()
}

fn with(choice: u8, input: impl AsRef<[u8]>) -> Vec<u8> {
    [&[choice], input.as_ref()].concat()
}

fn compact(json: &str) -> String {
    let value: Value = serde_json::from_str(json).expect("JSON");
    value.to_string()
}

type Named = Vec<(&'static str, Vec<u8>)>;

fn documents() -> Named {
    let both = format!("{}\0{}", compact(CONFIG), compact(SPEC));
    vec![("strict", with(0, &both)), ("allowing", with(1, &both))]
}

// Archives.

/// An entry of an archive; the sum in its header is the reader's business.
fn entry(name: &str, flag: u8, link: &str, content: &[u8]) -> Vec<u8> {
    let mut block = vec![0; 512];
    let mut put = |at: usize, text: &[u8]| block[at..at + text.len()].copy_from_slice(text);
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{:011o}\0", content.len()).as_bytes());
    put(136, b"14711311000\0");
    put(156, &[flag]);
    put(157, link.as_bytes());
    put(257, b"ustar\x0000");
    put(329, b"0000000\0");
    put(337, b"0000000\0");
    block.extend(content);
    block.resize(block.len().next_multiple_of(512), 0);
    block
}

fn record(key: &str, value: &str) -> Vec<u8> {
    let rest = format!(" {key}={value}\n");
    let length = (1..)
        .find(|length: &usize| length.to_string().len() + rest.len() == *length)
        .expect("a length");
    format!("{length}{rest}").into_bytes()
}

fn archive(choice: u8, entries: &[Vec<u8>]) -> Vec<u8> {
    [vec![choice], entries.concat(), vec![0; 1024]].concat()
}

fn vetted(choice: u8) -> Named {
    vec![
        (
            "plain",
            archive(
                choice,
                &[
                    entry("config.dump", b'0', "", b"{}"),
                    entry("spec.dump", b'0', "", b"{}"),
                    entry("checkpoint/", b'5', "", b""),
                    entry("checkpoint/core-1.img", b'0', "", &[7; 600]),
                ],
            ),
        ),
        (
            // As a volume's own archive, but with names that could be outside.
            "one-in-another",
            archive(
                choice,
                &[
                    entry(
                        "volumes/v.tar",
                        b'0',
                        "",
                        &[
                            entry("checkpoint/a", b'0', "", &[7; 600]),
                            entry("checkpoint/b", b'0', "", &[8; 300]),
                        ]
                        .concat(),
                    ),
                    entry("checkpoint/c", b'0', "", b"x"),
                ],
            ),
        ),
        (
            "extended",
            archive(
                choice,
                &[
                    entry(
                        "pax",
                        b'x',
                        "",
                        &[record("path", "volumes/v.tar"), record("size", "3")].concat(),
                    ),
                    entry("x", b'0', "", b"abc"),
                ],
            ),
        ),
    ]
}

fn walker() -> Named {
    let mut seeds = vetted(0b0010);
    seeds.push((
        "long-name",
        archive(
            0,
            &[
                entry("././@LongLink", b'L', "", b"a/name/that/is/longer\0"),
                entry("a/name", b'0', "", b"x"),
            ],
        ),
    ));
    seeds
}

fn files() -> Named {
    let sparse = [
        record("GNU.sparse.major", "1"),
        record("GNU.sparse.minor", "0"),
        record("GNU.sparse.realsize", "100000"),
        record("mtime", "1700000000.5"),
        record("SCHILY.xattr.user.a", "b"),
    ]
    .concat();
    let mut map = b"2\n0\n5\n90000\n3\n".to_vec();
    map.resize(512, 0);
    map.extend(b"helloend");
    vec![
        (
            "kinds",
            archive(
                0,
                &[
                    entry("rootfs/", b'5', "", b""),
                    entry("rootfs/etc/", b'5', "", b""),
                    entry("rootfs/etc/passwd", b'0', "", b"root:x:0:0"),
                    entry("rootfs/etc/shadow", b'W', "", b""),
                    entry("rootfs/etc/link", b'2', "../../x", b""),
                    entry("rootfs/etc/hard", b'1', "rootfs/etc/passwd", b""),
                    entry("rootfs/pipe", b'6', "", b""),
                    entry("shm/segment", b'0', "", &[1; 40]),
                ],
            ),
        ),
        (
            "sparse",
            archive(
                0,
                &[
                    entry("volumes/data/", b'W', "", b""),
                    entry("pax", b'x', "", &sparse),
                    entry("volumes/data/file", b'0', "", &map),
                ],
            ),
        ),
        (
            "through-links",
            archive(
                0,
                &[
                    entry("rootfs/out/secret", b'0', "", b"x"),
                    entry("rootfs/x", b'1', "rootfs/out/deep/secret", b""),
                ],
            ),
        ),
        (
            "replaced",
            archive(
                0,
                &[
                    entry("rootfs/a", b'2', "../outside", b""),
                    entry("rootfs/a/", b'5', "", b""),
                    entry("rootfs/a/b", b'0', "", b"x"),
                    entry("rootfs/a", b'W', "", b""),
                ],
            ),
        ),
    ]
}

// Streams.

fn transfer() -> Named {
    let sent = |content: &'static [u8], compression| -> Vec<u8> {
        let content = stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(content))]);
        let (wire, _) = send_as(content, compression);
        let wire: Vec<Bytes> = wait_for(wire.try_collect()).expect("sent");
        wire.concat()
    };
    let zeros = &[0; 4000];
    // Only what the frames hold, for the choice that makes frames itself.
    let bare = |wire: Vec<u8>| wire[4..wire.len() - 28].to_vec();
    vec![
        ("plain", with(0, sent(b"content", Compression::Measured))),
        ("zstd", with(0, sent(zeros, Compression::Always))),
        ("zstd-bare", with(3, bare(sent(zeros, Compression::Always)))),
    ]
}

fn header() -> Named {
    let rest = stream::iter([Ok::<_, crate::bundle::Error>(Bytes::from_static(b"rest"))]);
    let wire: Vec<Bytes> =
        wait_for(headed(&flows(), rest).expect("a header").try_collect()).expect("sent");
    vec![("flows", with(0, wire.concat()))]
}

fn images() -> Named {
    let file = |name: &str, content: &[u8]| {
        [
            &[name.len() as u8],
            name.as_bytes(),
            &(content.len() as u64).to_be_bytes(),
            content,
        ]
        .concat()
    };
    let all = [
        file("inventory.img", &[1; 30]),
        file("pages-1.img", &[2; 300]),
        vec![0],
        b"rest".to_vec(),
    ];
    vec![
        ("two", all.concat()),
        ("tricks", file("../outside/x", b"x")),
    ]
}

/// As CRIU says it, from version 4.2 on.
fn command(word: u32, pages: u64, address: u64, memory: u64) -> Vec<u8> {
    [u64::from(word), pages, address, memory]
        .map(u64::to_le_bytes)
        .concat()
}

fn fetch() -> Named {
    let page = vec![0x55; rustix::param::page_size()];
    let part = |content: &[u8]| [&(content.len() as u16).to_le_bytes(), content].concat();
    let asked = [
        command(7, 1, 0x1000, 1),
        command(7, 1, 0x8000, 1),
        command(0x1023, 0, 0, 0),
    ];
    let present = 6 | 4 << 16;
    let answers = [
        command(present, 1, 0x1000, 1),
        page.clone(),
        command(present, 1, 0x8000, 1),
        page,
        vec![0; 4],
    ];
    let fetched = [part(&asked.concat()), answers.concat()];
    vec![
        ("requests", with(0, asked.concat())),
        ("fetched", with(2, fetched.concat())),
    ]
}

fn pages() -> Named {
    let process = 7 << 8 | 1;
    let shared = 9 << 8 | 2;
    let page = vec![0x55; rustix::param::page_size()];
    let stream = [
        command(5, 0, 0, process),
        command(4, 0, 0, process),
        command(6 | 1 << 16, 2, 0x40_0000, process),
        command(6 | 4 << 16, 1, 0x7f00_0000_0000, process),
        page,
        command(4, 0, 0, shared),
        command(6 | 1 << 16, 1, 0, shared),
        command(0x1023, 0, 0, 0),
    ];
    let without = [&stream[..3], &stream[5..]].concat();
    vec![
        ("present", with(0, stream.concat())),
        ("absent", with(0, without.concat())),
    ]
}

fn stats() -> Named {
    let image = |message: &[u8]| {
        [
            &0x5510_5940_u32.to_le_bytes()[..],
            &0x5709_3306_u32.to_le_bytes(),
            &(message.len() as u32).to_le_bytes(),
            message,
        ]
        .concat()
    };
    // Times and numbers of `images/stats.proto`.
    let dump = [
        0x0a, 18, 8, 100, 16, 0xeb, 0xa3, 4, 24, 1, 32, 1, 40, 9, 48, 0, 56, 3, 72,
    ];
    let restore = [0x12, 11, 8, 1, 16, 2, 24, 3, 32, 0xf0, 0x2e, 40];
    let cut = |message: &[u8], last: &[u8]| image(&[message, last].concat());
    vec![
        ("dump", with(0, cut(&dump, &[0]))),
        ("restore", with(1, cut(&restore, &[5]))),
    ]
}

// Words of other hosts, of Podman and of its runtime.

fn container() -> Value {
    let (container, _) = crate::podman::fuzzing::offered(INSPECT);
    serde_json::to_value(container).expect("JSON")
}

fn host() -> Value {
    let (_, host) = crate::podman::fuzzing::offered(INSPECT);
    serde_json::to_value(host).expect("JSON")
}

fn network() -> Value {
    json!({"name": "net1", "driver": "bridge", "subnets": [
        {"subnet": "10.77.0.0/24", "gateway": "10.77.0.1",
         "lease_range": {"start_ip": "10.77.0.129", "end_ip": "10.77.0.255"}},
        {"subnet": "fd77::/64", "gateway": "fd77::1"}],
        "routes": [{"destination": "10.99.0.0/16", "gateway": "10.77.0.5"}],
        "ipv6_enabled": true, "internal": false, "dns_enabled": true,
        "network_dns_servers": ["1.1.1.1"], "labels": {"a": "b"},
        "ipam_options": {"driver": "host-local"}})
}

fn proposal() -> Value {
    json!({"public_key": "uGr4CO0sgUgUsIbt1Bp8rZDy7S5T5XTFz9ZNoOYDuGE=", "listen_port": 51820,
        "mtu": 1500, "ipv6": true, "taken": ["10.88.0.0/16", "192.0.2.0/24", "fd00::/64"]})
}

fn flow() -> Value {
    let entry = entries().remove(0);
    let flow = entry.flow_of(entry.reply.source).expect("a flow");
    serde_json::to_value(flow).expect("JSON")
}

fn flows() -> Value {
    json!({ "flows": [flow()] })
}

fn protocol() -> Named {
    let version = |major: u32, minor: u32, patch: u32| json!({"major": major, "minor": minor, "patch": patch});
    let features = json!({"architecture": "x86_64", "kernel_release": "6.12.41-amd64",
        "kernel": version(6, 12, 41), "criu": {"version": version(4, 2, 0), "complaint": null, "dirty_tracking": true,
        "lazy_pages": true, "pagemap_scan": true, "nftables_lock": true}, "libcriu": null,
        "runtimes": [{"name": "runc", "path": "/usr/bin/runc", "version": version(1, 3, 6)}],
        "network_lock": {"configured": null, "misplaced": [], "iptables": true},
        "cpu_flags": ["fpu", "sse2"], "root": true});
    let offer = json!({"container": container(), "networks": [network()], "host": host(),
        "features": features, "direct": true});
    let prepare = json!({"offer": &offer, "hop": proposal(), "forward": true});
    let seen = flow()["seen"].clone();
    let introduction = json!({"name": "host-c", "fingerprint": FINGERPRINT,
        "address": "host-c.example:27757"});
    let addresses = json!(["10.88.0.5", "fd88::5"]);
    let messages = [
        ("offer", 0, offer),
        ("prepare", 1, prepare),
        ("flows", 2, flows()),
        (
            "assessment",
            3,
            json!({"findings": [], "image_present": true, "networks_to_make": ["net1"],
                "host": host(), "direct": false}),
        ),
        ("prepared", 4, json!({"hop": proposal()})),
        (
            "running",
            5,
            json!({"restore": {"secs": 0, "nanos": 5}, "flows": 1, "home": [0]}),
        ),
        ("introduction", 6, introduction.clone()),
        (
            "expect",
            7,
            json!({"addresses": addresses, "anchor": introduction}),
        ),
        (
            "shorten",
            8,
            json!({"container": ID, "addresses": addresses, "to": introduction}),
        ),
        (
            "forget",
            10,
            json!({"addresses": addresses, "flows": [seen]}),
        ),
        ("open", 11, json!({"forwards": ID, "hop": proposal()})),
        ("switch", 13, json!({"flows": [seen]})),
        ("status", 15, json!({"stage": "restoring"})),
        ("undone", 16, json!({"leftovers": ["a rule"]})),
    ];
    let written = |(name, which, message): (_, _, Value)| (name, with(which, message.to_string()));
    messages.into_iter().map(written).collect()
}

fn token() -> Named {
    let state = tempfile::tempdir().expect("a directory");
    let invites = Invites::open(state.path(), &Limits::default()).expect("a store");
    let offer = Offer {
        name: "host-a".parse().expect("a name"),
        address: "host-a.example".parse().expect("an address"),
        fingerprint: FINGERPRINT.parse().expect("a fingerprint"),
    };
    let token = invites
        .create(&offer, std::time::Duration::from_secs(60))
        .expect("a token");
    vec![
        ("token", with(0, token.to_string())),
        ("address", with(1, "[2001:db8::1]:27757")),
        ("name", with(2, "host-a.example")),
        ("fingerprint", with(3, FINGERPRINT)),
    ]
}

/// As Podman 5.8.6 says it, shortened.
fn podman() -> Named {
    let image = "6b9a7da665791134c70756a2f5395381241363c140e70303bbc24d970b01304a";
    let info = json!({"host": {"arch": "amd64", "cgroupManager": "systemd", "cgroupVersion": "v2",
        "kernel": "6.12.41", "hostname": "a", "networkBackend": "netavark",
        "ociRuntime": {"name": "crun", "path": "/usr/bin/crun", "version": "crun version 1.28\n"},
        "security": {"apparmorEnabled": false, "rootless": false, "selinuxEnabled": false}},
        "store": {"graphDriverName": "overlay", "graphRoot": "/var/lib/containers/storage",
        "runRoot": "/run/containers/storage", "volumePath": "/var/lib/containers/storage/volumes"},
        "version": {"APIVersion": "5.8.6", "Version": "5.8.6"}});
    let line = json!({"AutoRemove": false, "Id": ID, "Image": "localhost/bb:1", "ImageID": image,
        "IsInfra": false, "Labels": {"l": "m"}, "Names": ["web"], "Networks": ["net1"], "Pid": 18276,
        "Pod": "", "State": "running", "Ports": [{"host_ip": "127.0.0.1", "container_port": 9000,
        "host_port": 9000, "range": 3, "protocol": "tcp,udp"}]});
    let event = json!({"status": "start", "id": ID, "from": "localhost/bb:1", "Type": "container",
        "Action": "start", "Actor": {"ID": ID, "Attributes": {"name": "ulog"}}, "scope": "local",
        "time": 1_795_379_033, "timeNano": 1_795_379_033_293_532_666_u64});
    let volume = json!({"Name": "vol1", "Driver": "local", "Mountpoint": "/v/_data", "Labels": null,
        "Scope": "local", "Options": {}, "UID": 100_000, "GID": 100_000, "Anonymous": true});
    let report = json!({"Id": ID, "runtime_restore_duration": 91_000, "criu_statistics": {
        "forking_time": 1, "restore_time": 22_000, "pages_restored": 90, "pages_compared": 1,
        "pages_skipped_cow": 2}});
    let answers = [
        ("inspect", 0, compact(INSPECT)),
        ("info", 1, info.to_string()),
        ("list", 2, line.to_string()),
        ("event", 3, event.to_string()),
        ("network", 4, network().to_string()),
        ("volume", 5, volume.to_string()),
        (
            "image",
            6,
            json!({"Id": image, "RepoTags": null, "Size": 3, "Architecture": "amd64"}).to_string(),
        ),
        ("loaded", 7, json!({"Names": ["a:1"]}).to_string()),
        ("report", 8, report.to_string()),
        (
            "fault",
            9,
            json!({"cause": "no such container", "message": "no container with name x",
                "response": 404})
            .to_string(),
        ),
    ];
    let input = |(name, which, text): (_, _, String)| (name, with(which, text));
    answers.into_iter().map(input).collect()
}

fn runtime() -> Named {
    let arguments = [
        "--log-format=json",
        "restore",
        "--image-path",
        "/a",
        "--pid-file=/p",
        ID,
    ];
    let call = json!({"version": 1, "program": "/usr/bin/runc", "invocation": {"verb": "restore",
        "container": ID, "arguments": arguments}});
    let order = json!({"order": "run", "arguments": arguments, "environment": {"A": "/b"}});
    let outcome = json!({"success": true, "status": "exit status: 0", "pid": 7});
    vec![
        ("call", with(0, call.to_string())),
        ("order", with(2, order.to_string())),
        ("outcome", with(4, outcome.to_string())),
        ("arguments", with(1, arguments.join("\n"))),
    ]
}

// Words of the kernel, and packets.

fn entries() -> Vec<Entry> {
    let tuple = |source: &str, destination: &str, protocol| Tuple {
        source: source.parse().expect("an address"),
        destination: destination.parse().expect("an address"),
        protocol,
    };
    let side = TcpSide {
        window_scale: 7,
        flags: 0x23,
    };
    let tcp = |source, destination| Protocol::Tcp {
        source,
        destination,
    };
    let published = Entry {
        original: tuple("192.0.2.9", "198.51.100.1", tcp(40000, 8080)),
        reply: tuple("10.88.0.5", "192.0.2.9", tcp(80, 40000)),
        status: Status::PORTABLE
            .and(Status::DESTINATION_NAT)
            .and(Status::SOURCE_NAT),
        timeout: std::time::Duration::from_secs(100),
        mark: Mark::to(crate::conntrack::Direction::Original, HopId::MAX),
        tcp: Some(TcpInfo {
            state: TcpState::Established,
            original: side,
            reply: side,
        }),
        sctp: None,
        counters: None,
        zone: 3,
        id: Some(7),
    };
    let echo = Protocol::Icmpv6 {
        id: 9,
        kind: 128,
        code: 0,
    };
    let ping = tuple("fd88::5", "2001:db8::1", echo);
    let pinging = Entry {
        original: ping,
        reply: ping.inverse(),
        tcp: None,
        ..published.clone()
    };
    vec![published, pinging]
}

fn message(kind: u16, body: Body) -> Vec<u8> {
    let mut bytes = Vec::new();
    let request = Request::new(kind, body);
    request
        .write(1, NlmF::CREATE, &mut bytes)
        .expect("written to memory");
    bytes
}

fn conntrack() -> Named {
    let bodies = crate::conntrack::fuzzing::bodies(&entries());
    let messages = bodies.into_iter().map(|body| message(1 << 8, body));
    vec![("two", messages.collect::<Vec<_>>().concat())]
}

fn netlink() -> Named {
    let mut refusal = Body::new(&(-22_i32).to_ne_bytes());
    refusal.append(&Body::new(&[0; 16]));
    refusal.text(1, "what the kernel did not like");
    let mut refused = message(2, refusal);
    // NLM_F_CAPPED and NLM_F_ACK_TLVS.
    refused[6..8].copy_from_slice(&0x300_u16.to_ne_bytes());
    vec![("refusal", refused), ("entries", conntrack().remove(0).1)]
}

fn sockets() -> Named {
    let answer = |family: u8, state: u8| {
        let mut fixed = [0; 72];
        fixed[..4].copy_from_slice(&[family, state, 0, 0]);
        fixed[4..8].copy_from_slice(&[0x1f, 0x90, 0x9c, 0x40]);
        fixed[8..12].copy_from_slice(&[127, 0, 0, 1]);
        fixed[24..28].copy_from_slice(&[127, 0, 0, 1]);
        fixed[56] = 3;
        let mut body = Body::new(&fixed);
        body.leaf(7, &[9; 36]);
        message(20, body)
    };
    let all = [answer(2, 1), answer(10, 10)].concat();
    vec![("tcp", with(0, &all)), ("udp", with(1, answer(2, 7)))]
}

fn queue() -> Named {
    let mut body = Body::netfilter(2, 7);
    let packet = [
        0x45, 0, 0, 60, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 88, 0, 5, 192, 0, 2, 1,
    ];
    body.leaf(1, &[0, 0, 0, 9, 8, 0, 0])
        .leaf(5, &3_u32.to_be_bytes())
        .leaf(13, &60_u32.to_be_bytes())
        .leaf(14, &2_u32.to_be_bytes())
        .leaf(10, &packet);
    vec![("packet", message(3 << 8, body))]
}

fn packets() -> Named {
    let runs = crate::tunnel::fuzzing::seeds();
    let named = |(name, how, input): (_, u8, Vec<u8>)| (name, with(how, input));
    runs.into_iter().map(named).collect()
}
