//! The podman module against real Podmans: what it reads, moves, refuses and leaves behind.

// An error here is a failed test, and its Debug form says what Podman said.
#![allow(clippy::unwrap_used)]

mod lab;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use lab::{IMAGE, Lab, Node};
use livemig::podman::{
    CheckpointOptions, Client, Container, ContainerId, Error, FailureLog, Mode, Mount, Refusal,
    RemoveOptions, RestoreOptions, Status, Volume, failure_log,
};

fn podman(node: &Node) -> Client {
    Client::new(&node.podman_socket())
}

const FORCE: RemoveOptions = RemoveOptions {
    force: true,
    timeout: Some(Duration::ZERO),
    volumes: true,
};

fn running() -> CheckpointOptions {
    CheckpointOptions {
        leave_running: true,
        tcp_established: true,
        ignore_rootfs: true,
        ..CheckpointOptions::default()
    }
}

fn established() -> RestoreOptions {
    RestoreOptions {
        tcp_established: true,
        print_stats: true,
        ..RestoreOptions::default()
    }
}

async fn whole(chunks: impl Stream<Item = Result<Bytes, Error>>) -> Vec<u8> {
    chunks
        .try_fold(Vec::new(), async |mut all, chunk| {
            all.extend_from_slice(&chunk);
            Ok(all)
        })
        .await
        .expect("the archive comes to its end")
}

/// An archive in pieces, as they would come over a network.
fn pieces(archive: &[u8]) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let pieces: Vec<_> = archive
        .chunks(10_000)
        .map(|piece| Ok(Bytes::copy_from_slice(piece)))
        .collect();
    stream::iter(pieces)
}

async fn refusal(client: &Client, archive: &[u8]) -> (Refusal, Error) {
    let error = client
        .restore(pieces(archive), &established())
        .await
        .expect_err("this cannot be restored");
    assert!(matches!(error, Error::Refused { .. }), "{error:?}");
    (error.refusal().expect("a refusal"), error)
}

/// The file of a container's cgroup, as this test can open it.
fn cgroup_file(host: &Node, container: &Container, file: &str) -> PathBuf {
    let path = container.cgroup_path.as_ref().expect("it runs");
    host.path("/sys/fs/cgroup")
        .join(path.strip_prefix("/").expect("it begins with a slash"))
        .join(file)
}

#[tokio::test]
async fn reads_hosts_and_containers() {
    let lab = Lab::builder(1).up().await;
    let h1 = lab.host(1);
    let client = podman(h1);

    let host = client.host().await.unwrap();
    assert_eq!(host.runtime.name, "runc");
    assert!(
        host.runtime.version.contains("runc"),
        "{}",
        host.runtime.version
    );
    assert_eq!(host.cgroup_version, 2);
    assert_eq!(host.cgroup_manager, "cgroupfs");
    assert_eq!(host.network_backend, "netavark");
    assert_eq!(host.graph_driver, "overlay");
    assert!(!host.rootless);
    let version = h1.exec(&["podman", "version", "-f", "{{.Version}}"]).await;
    assert_eq!(host.podman_version, version.text());

    assert!(client.list(true).await.unwrap().is_empty());
    assert!(client.volumes().await.unwrap().is_empty());
    assert_eq!(client.networks().await.unwrap(), ["podman"]);

    h1.sh(
        "podman network create --subnet 10.60.0.0/24 --subnet fd60::/64 --route 10.61.0.0/16,10.60.0.5 \
             --label a=b one
         echo hush | podman secret create sec -
         echo x > /bound; mkdir /lower",
    )
    .await;
    let id = h1
        .run_workload(
            "web",
            &[
                "--rm",
                "-p=7000:7000",
                "-p=127.0.0.1:9000-9002:8000-8002/udp",
                "-v=vol:/data",
                "-v=/anonymous",
                "-v=/bound:/bound:ro",
                "-v=/lower:/over:O",
                "--tmpfs=/scratch",
                "--network=one:ip=10.60.0.9",
                "--secret=sec",
                "--secret=sec,type=env,target=SEC",
                "--health-cmd=true",
                "--label=l=m",
                "--annotation=an=no",
                "-t",
            ],
            &["echo", "7000"],
        )
        .await;
    let web = client.inspect("web").await.unwrap();
    assert_eq!(web.id.as_str(), id);
    assert_eq!(client.inspect(&id[..12]).await.unwrap().id, web.id);
    assert!(web.is_running() && web.auto_remove && web.tty && web.health_check);
    assert_eq!(web.image_name, IMAGE);
    assert_eq!(web.network_mode, Mode::Bridge);
    assert_eq!(web.networks.len(), 1);
    assert_eq!(web.networks[0].ip.unwrap().to_string(), "10.60.0.9");
    assert!(
        web.networks[0]
            .ip6
            .unwrap()
            .to_string()
            .starts_with("fd60::")
    );
    assert!(web.networks[0].mac.is_some());
    assert_eq!(web.ports.len(), 2);
    assert_eq!((web.ports[1].host_port, web.ports[1].range), (9000, 3));
    assert_eq!(web.secrets, ["sec"]);
    assert_eq!(web.environment_secrets, ["sec"]);
    assert_eq!(web.labels["l"], "m");
    assert_eq!(web.annotations["an"], "no");
    let kinds: Vec<_> = web
        .mounts
        .iter()
        .map(|mount| match mount {
            Mount::Volume {
                anonymous: true, ..
            } => "anonymous",
            Mount::Volume { .. } => "volume",
            Mount::Bind {
                read_only: true, ..
            } => "bind",
            Mount::Overlay { .. } => "overlay",
            Mount::Tmpfs { .. } => "tmpfs",
            _ => "?",
        })
        .collect();
    assert_eq!(kinds, ["anonymous", "bind", "volume", "overlay", "tmpfs"]);
    // What it says is where things are.
    let upper = web.rootfs.upper.as_ref().unwrap();
    assert!(h1.path(upper.to_str().unwrap()).is_dir());
    assert!(h1.path(web.static_dir.to_str().unwrap()).is_dir());
    assert_eq!(host.static_dir(&web.id), web.static_dir);
    assert!(cgroup_file(h1, &web, "cgroup.procs").exists());

    // A shared namespace is told as such.
    h1.run_workload("join", &["--network=container:web"], &["echo", "7001"])
        .await;
    let join = client.inspect("join").await.unwrap();
    assert_eq!(join.network_mode, Mode::Container(id.clone()));
    assert!(join.networks.is_empty() && join.ports.is_empty());
    assert_eq!(join.dependencies, std::slice::from_ref(&web.id));

    let listed = client.list(false).await.unwrap();
    assert_eq!(listed.len(), 2);
    let line = listed.iter().find(|line| line.name == "web").unwrap();
    assert_eq!((&line.id, line.pid), (&web.id, web.pid));
    assert_eq!(line.image, web.image);
    assert_eq!(line.networks, ["one"]);
    let published = client.published_ports().await.unwrap();
    assert_eq!(published.len(), 2);
    assert!(published.iter().all(|(name, _)| name == "web"));
    let used = client.containers_on_network("one").await.unwrap();
    assert_eq!(used.len(), 2);
    assert_eq!(used[0].address.to_string(), "10.60.0.9");

    // Whatever is not there is not an error but where it is needed.
    assert!(client.exists("web").await.unwrap());
    assert!(!client.exists("nobody").await.unwrap());
    assert!(client.inspect("nobody").await.unwrap_err().is_not_found());
    assert_eq!(client.image("nothing:1").await.unwrap(), None);
    assert_eq!(client.volume("nothing").await.unwrap(), None);
    assert_eq!(client.network("nothing").await.unwrap(), None);
    let nobody: ContainerId = "0".repeat(64).parse().unwrap();
    assert!(!client.remove(&nobody, FORCE).await.unwrap());
    assert!(matches!(
        client.inspect("web/../x?y").await.unwrap_err(),
        Error::Name { .. }
    ));
    lab.down().await;
}

/// A checkpoint goes from socket to socket, with the cgroup frozen beforehand, with changed files
/// of our own in front of it, and the frozen source can be removed.
async fn moves(runtime: &str) {
    let lab = Lab::builder(2).runtime(runtime).up().await;
    let (h1, h2) = (lab.host(1), lab.host(2));
    let (here, there) = (podman(h1), podman(h2));
    h1.run_workload("web", &["-p=7000:7000", "-v=vol:/data"], &["echo", "7000"])
        .await;
    let web = here.inspect("web").await.unwrap();
    let Some(Mount::Volume { source, .. }) = web.mounts.first() else {
        panic!("{:?}", web.mounts)
    };
    std::fs::write(
        h1.path(source.join("file").to_str().unwrap()),
        "in a volume",
    )
    .unwrap();

    let freeze = cgroup_file(h1, &web, "cgroup.freeze");
    std::fs::write(&freeze, "1").unwrap();
    let archive = here.checkpoint(&web.id, &running()).await.unwrap();
    assert_eq!(std::fs::read_to_string(&freeze).unwrap().trim(), "1");
    assert!(here.inspect("web").await.unwrap().is_running());

    // Two entries before Podman's own, without an end of archive between them.
    let mut delta = tar::Builder::new(Vec::new());
    for (name, content) in [("added", "by us"), ("both", "added and deleted")] {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o640);
        header.set_uid(7);
        delta
            .append_data(&mut header, name, content.as_bytes())
            .unwrap();
    }
    let delta = delta.into_inner().unwrap();
    let mut front = Vec::new();
    for (name, content) in [
        ("rootfs-diff.tar", delta.as_slice()),
        ("deleted.files", br#"["/both"]"#),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_path(name).unwrap();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_cksum();
        front.extend_from_slice(header.as_bytes());
        front.extend_from_slice(content);
        front.resize(front.len().next_multiple_of(512), 0);
    }
    let archive = stream::once(async move { Ok(Bytes::from(front)) }).chain(archive);
    let restored = there.restore(archive, &established()).await.unwrap();

    assert_eq!(restored.id, web.id);
    assert!(restored.runtime_restore.unwrap() > Duration::from_millis(1));
    assert!(restored.criu.unwrap().pages_restored > 0);
    let moved = there.inspect("web").await.unwrap();
    assert!(moved.is_running());
    assert_eq!(moved.image, web.image);
    assert_eq!(moved.networks[0].ip, web.networks[0].ip);
    assert_eq!(moved.networks[0].mac, web.networks[0].mac);
    assert_eq!(moved.ports, web.ports);
    let upper = moved.rootfs.upper.as_ref().unwrap();
    let added = h2.path(upper.join("added").to_str().unwrap());
    assert_eq!(std::fs::read_to_string(&added).unwrap(), "by us");
    assert_eq!(
        std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&added).unwrap()),
        7
    );
    assert!(!h2.path(upper.join("both").to_str().unwrap()).exists());
    let Some(Mount::Volume { source, .. }) = moved.mounts.first() else {
        panic!("{:?}", moved.mounts)
    };
    assert_eq!(
        std::fs::read_to_string(h2.path(source.join("file").to_str().unwrap())).unwrap(),
        "in a volume"
    );

    assert!(
        here.remove(&web.id, FORCE).await.unwrap(),
        "frozen as it is"
    );
    assert!(!here.exists("web").await.unwrap());
    assert!(!freeze.exists());
    assert!(there.inspect("web").await.unwrap().is_running());

    // In place, where it is now.
    let stop = CheckpointOptions {
        leave_running: false,
        ..running()
    };
    let archive = there.checkpoint(&web.id, &stop).await.unwrap();
    assert!(whole(archive).await.len() > 10_000);
    assert_eq!(there.inspect("web").await.unwrap().status, Status::Exited);
    let back = there
        .restore_in_place(&web.id, &established())
        .await
        .unwrap();
    assert_eq!(back.id, web.id);
    assert!(there.inspect("web").await.unwrap().is_running());
    lab.down().await;
}

#[tokio::test]
async fn moves_with_runc() {
    moves("runc").await;
}

#[tokio::test]
async fn moves_with_crun() {
    moves("crun").await;
}

#[tokio::test]
async fn refusals_say_what_is_wrong() {
    let lab = Lab::builder(2).up().await;
    let (h1, h2) = (lab.host(1), lab.host(2));
    let (here, there) = (podman(h1), podman(h2));
    h1.sh("podman network create --subnet 10.60.0.0/24 one; podman create --name still localhost/workload")
        .await;

    let nobody: ContainerId = "0".repeat(64).parse().unwrap();
    let error = here.checkpoint(&nobody, &running()).await.err().unwrap();
    assert!(error.is_not_found(), "{error:?}");
    let still = here.inspect("still").await.unwrap();
    let error = here.checkpoint(&still.id, &running()).await.err().unwrap();
    assert_eq!(error.refusal(), Some(Refusal::NotRunning), "{error:?}");

    h1.run_workload(
        "web",
        &["-p=7000:7000", "-v=vol:/data", "--network=one:ip=10.60.0.9"],
        &["echo", "7000"],
    )
    .await;
    let web = here.inspect("web").await.unwrap();
    let archive = whole(here.checkpoint(&web.id, &running()).await.unwrap()).await;

    let (what, error) = refusal(&there, &archive).await;
    assert_eq!(what, Refusal::NetworkMissing, "{error:?}");
    assert!(error.to_string().contains("one"), "{error}");
    assert!(error.hint().is_some());

    h2.exec(&[
        "podman",
        "network",
        "create",
        "--subnet",
        "10.70.0.0/24",
        "one",
    ])
    .await;
    let (what, error) = refusal(&there, &archive).await;
    assert_eq!(what, Refusal::AddressOutside, "{error:?}");
    // It is left behind as "created", with its volume.
    assert_eq!(there.inspect("web").await.unwrap().status, Status::Created);
    let (what, error) = refusal(&there, &archive).await;
    assert_eq!(what, Refusal::VolumeExists, "{error:?}");
    assert!(there.remove(&web.id, FORCE).await.unwrap());
    assert!(there.remove_volume("vol").await.unwrap());
    assert!(there.remove_network("one").await.unwrap());
    let one = here.network("one").await.unwrap().unwrap();
    there.create_network(&one).await.unwrap();

    h2.exec(&["podman", "create", "--name", "web", IMAGE]).await;
    let (what, error) = refusal(&there, &archive).await;
    assert_eq!(what, Refusal::NameInUse, "{error:?}");
    h2.exec(&["podman", "rm", "web"]).await;

    h2.run_workload("other", &["--network=one:ip=10.60.0.9"], &["echo", "7000"])
        .await;
    let clean = async || {
        assert!(there.remove(&web.id, FORCE).await.unwrap());
        assert!(there.remove_volume("vol").await.unwrap());
    };
    let (what, error) = refusal(&there, &archive).await;
    assert_eq!(what, Refusal::AddressInUse, "{error:?}");
    clean().await;
    h2.exec(&["podman", "rm", "-f", "-t0", "other"]).await;

    h2.run_workload("other", &["-p=7000:7000"], &["echo", "7000"])
        .await;
    let (what, error) = refusal(&there, &archive).await;
    assert_eq!(what, Refusal::PortInUse, "{error:?}");
    clean().await;
    h2.exec(&["podman", "rm", "-f", "-t0", "other"]).await;

    let (what, error) = refusal(&there, &archive[..archive.len() / 2 + 100]).await;
    assert_eq!(what, Refusal::BadArchive, "{error:?}");
    let broken = pieces(&archive)
        .take(5)
        .chain(stream::once(async { Err(io::Error::other("cut off")) }));
    let error = there.restore(broken, &established()).await.unwrap_err();
    assert!(matches!(error, Error::Archive { .. }), "{error:?}");
    assert!(error.to_string().contains("cut off"), "{error}");
    assert!(!there.exists("web").await.unwrap());
    // Nobody waits for the answer any more: Podman drops what it had staged.
    let slow = pieces(&archive).take(5).chain(stream::pending());
    let cancelled =
        tokio::time::timeout(Duration::from_secs(1), there.restore(slow, &established())).await;
    assert!(cancelled.is_err());
    let mut looks = 0;
    while !h2.exec(&["ls", "-A", "/var/tmp"]).await.text().is_empty() {
        looks += 1;
        assert!(looks < 200, "a cancelled restore leaves its archive behind");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!there.exists("web").await.unwrap());

    // CRIU's reason is in its log. (The first byte of an image is its magic number.)
    let at = archive
        .windows(22)
        .position(|window| window == b"checkpoint/pstree.img\0")
        .unwrap();
    let mut damaged = archive.clone();
    damaged[at + 512] ^= 0xff;
    let (what, error) = refusal(&there, &damaged).await;
    assert_eq!(what, Refusal::Runtime, "{error:?}");
    let left = there.inspect("web").await.unwrap();
    assert_eq!(left.status, Status::Created);
    let log = failure_log(
        &h2.path(left.static_dir.to_str().unwrap()),
        FailureLog::Restore,
    )
    .unwrap();
    assert!(log.starts_with("Error ("), "{log}");
    assert!(log.contains("magic"), "{log}");
    clean().await;

    // Podman goes on listening on the port of the failed restore until it is made to tidy up.
    let sockets = format!("/proc/{}/net/tcp", h2.pid());
    let is_free = || {
        // 7000 in hexadecimal, and the kernel's TCP_LISTEN.
        !std::fs::read_to_string(&sockets)
            .unwrap()
            .lines()
            .any(|line| line.contains(":1B58 00000000:0000 0A"))
    };
    assert!(!is_free(), "if this fails, Podman has mended its leak");
    assert!(there.free_leaked_ports(is_free).await.unwrap());
    there
        .restore(pieces(&archive), &established())
        .await
        .unwrap();
    let (what, error) = refusal(&there, &archive).await;
    assert_eq!(what, Refusal::VolumeExists, "{error:?}");

    // The source did not notice any of it.
    assert!(here.inspect("web").await.unwrap().is_running());
    lab.down().await;
}

#[tokio::test]
async fn images_arrive_with_their_ids() {
    let lab = Lab::builder(2).cold(2).up().await;
    let (h1, h2) = (lab.host(1), lab.host(2));
    let (here, there) = (podman(h1), podman(h2));
    // Imported; of several layers in both formats; committed; without a name.
    h1.sh(
        "mkdir /tmp/layers; cd /tmp/layers; echo 1 >one; echo 2 >two; tar cf base.tar one
         podman import -q base.tar localhost/imported:1
         printf 'FROM localhost/imported:1\nCOPY two /a\nCOPY one /b\nENV x=y\nLABEL l=m\n' >Containerfile
         podman build -q --layers -t localhost/built:1 . ; podman tag localhost/built:1 example.org/also:v2
         podman build -q --layers --format docker --label d=e -t localhost/docker:1 .
         podman create --name c localhost/built:1 /b; podman commit -q c localhost/committed:1
         podman rm c; podman build -q --layers --label n=o . >/tmp/nameless",
    )
    .await;
    let nameless = h1.exec(&["cat", "/tmp/nameless"]).await;
    for name in [
        IMAGE,
        "localhost/imported:1",
        "localhost/built:1",
        "localhost/docker:1",
        "localhost/committed:1",
        nameless.text(),
    ] {
        let image = here.image(name).await.unwrap().expect(name);
        assert!(there.image(image.id.as_str()).await.unwrap().is_none());
        let archive = here.export_image(&image.id).await.unwrap();
        let names = there.load_image(archive).await.unwrap();
        assert_eq!(names, [format!("sha256:{}", image.id)]);
        let arrived = there.image(image.id.as_str()).await.unwrap().expect(name);
        assert_eq!(arrived.id, image.id);
        assert!(arrived.names.is_empty());
        for name in &image.names {
            there.tag_image(&image.id, name).await.unwrap();
        }
        let arrived = there.image(image.id.as_str()).await.unwrap().unwrap();
        let sorted = |mut names: Vec<String>| {
            names.sort();
            names
        };
        assert_eq!(sorted(arrived.names), sorted(image.names));
        assert_eq!(arrived.labels, image.labels);
    }
    let built = here.image("example.org/also:v2").await.unwrap().unwrap();
    assert!(there.remove_image(&built.id).await.unwrap());
    assert!(!there.remove_image(&built.id).await.unwrap());
    assert_eq!(there.image("localhost/built:1").await.unwrap(), None);

    let nothing = "0".repeat(64).parse().unwrap();
    let error = here.export_image(&nothing).await.err().unwrap();
    assert!(
        matches!(error, Error::Refused { .. } | Error::NotFound { .. }),
        "{error:?}"
    );

    // The ID alone is not enough for a restore: Podman asks a registry for the name.
    h1.run_workload("web", &[], &["echo", "7000"]).await;
    let web = here.inspect("web").await.unwrap();
    h2.exec(&["podman", "untag", IMAGE]).await;
    let archive = whole(here.checkpoint(&web.id, &running()).await.unwrap()).await;
    let (what, error) = refusal(&there, &archive).await;
    assert_eq!(what, Refusal::ImageMissing, "{error:?}");
    let image = web.image.unwrap();
    there.tag_image(&image, &web.image_name).await.unwrap();
    there
        .restore(pieces(&archive), &established())
        .await
        .unwrap();
    // In use: not removed, and nothing that uses it either.
    assert!(there.remove_image(&image).await.is_err());
    assert!(there.inspect("web").await.unwrap().is_running());
    lab.down().await;
}

#[tokio::test]
async fn makes_and_removes_volumes_and_networks() {
    let lab = Lab::builder(2).up().await;
    let (h1, h2) = (lab.host(1), lab.host(2));
    let (here, there) = (podman(h1), podman(h2));

    let volume = Volume {
        name: "vol".into(),
        driver: "local".into(),
        options: BTreeMap::from([
            ("type".into(), "tmpfs".into()),
            ("device".into(), "tmpfs".into()),
            ("o".into(), "size=1m".into()),
        ]),
        labels: BTreeMap::from([("l".into(), "m".into())]),
        ..Volume::default()
    };
    assert!(!here.volume_exists("vol").await.unwrap());
    here.create_volume(&volume).await.unwrap();
    let error = here.create_volume(&volume).await.unwrap_err();
    assert_eq!(error.refusal(), Some(Refusal::VolumeExists), "{error:?}");
    assert!(here.volume_exists("vol").await.unwrap());
    let made = here.volume("vol").await.unwrap().unwrap();
    // Podman adds what it made of them ("SIZE").
    for (key, value) in &volume.options {
        assert_eq!(made.options.get(key), Some(value));
    }
    assert_eq!(made.labels, volume.labels);
    assert!(!made.anonymous);
    there.create_volume(&made).await.unwrap();
    assert_eq!(
        there.volume("vol").await.unwrap().unwrap().options,
        made.options
    );
    assert_eq!(here.volumes().await.unwrap(), [made]);
    assert!(here.remove_volume("vol").await.unwrap());
    assert!(!here.remove_volume("vol").await.unwrap());

    // Content, from host to host.
    let plain = Volume {
        name: "plain".into(),
        ..Volume::default()
    };
    here.create_volume(&plain).await.unwrap();
    there.create_volume(&plain).await.unwrap();
    let place = |volume: Option<Volume>| volume.unwrap().mount_point.join("file");
    let from = place(here.volume("plain").await.unwrap());
    std::fs::write(h1.path(from.to_str().unwrap()), "content").unwrap();
    let content = here.export_volume("plain").await.unwrap();
    there.import_volume("plain", content).await.unwrap();
    let to = place(there.volume("plain").await.unwrap());
    assert_eq!(
        std::fs::read_to_string(h2.path(to.to_str().unwrap())).unwrap(),
        "content"
    );

    h1.sh(
        "podman network create --subnet 10.60.0.0/24 --ip-range 10.60.0.128/25 --subnet fd60::/64 \
             --route 10.61.0.0/16,10.60.0.5,77 --label a=b --dns 1.1.1.1 --opt mtu=1400 --opt isolate=true one
         podman network create --internal --disable-dns --subnet 10.62.0.0/24 two",
    )
    .await;
    for name in ["one", "two"] {
        let network = here.network(name).await.unwrap().unwrap();
        there.create_network(&network).await.unwrap();
        let made = there.network(name).await.unwrap().unwrap();
        assert_eq!(made.subnets, network.subnets);
        assert_eq!(made.routes, network.routes);
        assert_eq!(made.dns_servers, network.dns_servers);
        assert_eq!(made.options, network.options);
        assert_eq!(made.labels, network.labels);
        assert_eq!(made.ipam_options, network.ipam_options);
        assert_eq!(
            (made.internal, made.dns_enabled, made.ipv6_enabled),
            (network.internal, network.dns_enabled, network.ipv6_enabled)
        );
        let error = there.create_network(&network).await.unwrap_err();
        assert!(matches!(error, Error::Refused { .. }), "{error:?}");
    }
    h2.run_workload("web", &["--network=one"], &["echo", "7000"])
        .await;
    let error = there.remove_network("one").await.unwrap_err();
    assert!(error.to_string().contains("one"), "{error}");
    assert!(there.remove_network("two").await.unwrap());
    assert!(!there.remove_network("two").await.unwrap());
    lab.down().await;
}

#[tokio::test]
async fn tells_events_and_outlives_a_restart() {
    let lab = Lab::builder(1).up().await;
    let h1 = lab.host(1);
    let client = podman(h1);
    let mut events = client.events().await.unwrap();
    // Between the call and the first poll.
    h1.run_workload("web", &[], &["echo", "7000"]).await;
    let web = client.inspect("web").await.unwrap();
    let mut next = async |action: &str| {
        let found = async {
            loop {
                let event = events.next().await.expect("no end").unwrap();
                if event.kind == "container" && event.action == action {
                    return event;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), found)
            .await
            .unwrap_or_else(|_| panic!("no event {action}"))
    };
    let started = next("start").await;
    assert_eq!(
        (started.id.as_str(), started.name.as_str()),
        (web.id.as_str(), "web")
    );
    // While it is being polled.
    client.remove(&web.id, FORCE).await.unwrap();
    next("died").await;
    assert_eq!(next("remove").await.name, "web");

    // No connection is kept, so none breaks.
    h1.podman_service("restart").await;
    assert!(client.list(true).await.unwrap().is_empty());
    h1.podman_service("stop").await;
    let error = client.host().await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("podman.socket"));
    h1.podman_service("start").await;
    client.host().await.unwrap();
    lab.down().await;
}
