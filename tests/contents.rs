//! What moves with a container: its files, its volumes, its networks, its image.

mod lab;

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use lab::pair::{Pair, events, report};
use lab::{IMAGE, Lab, Node};
use serde_json::Value;

/// Moves a container from the first host to the second, and returns all that was told of it.
async fn migrate(pair: &Pair, name: &str, more: &[&str]) -> Vec<Value> {
    let output = pair.try_migrate(name, 1, 2, more).await;
    assert!(output.status.success(), "{output}");
    pair.assert_moved(name, 1, 2, &report(&output)).await;
    events(&output)
}

/// All that a file is, but its place.
#[derive(Debug, PartialEq, Eq)]
struct File {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    device: u64,
    modified: (i64, i64),
    content: Vec<u8>,
    attributes: BTreeMap<String, Vec<u8>>,
    /// The other names of the same file.
    names: Vec<PathBuf>,
}

/// Everything below a directory of a host, seen from outside of the host.
fn listing(root: &Path) -> BTreeMap<PathBuf, File> {
    let mut files = BTreeMap::new();
    let mut inodes: HashMap<u64, Vec<PathBuf>> = HashMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).expect("a directory can be read") {
            let path = entry.expect("an entry can be read").path();
            let meta = path.symlink_metadata().expect("what is listed is there");
            let kind = meta.file_type();
            let mut content = Vec::new();
            let kind = if kind.is_dir() {
                open.push(path.clone());
                "directory"
            } else if kind.is_symlink() {
                let target = std::fs::read_link(&path).expect("a link can be read");
                content = target.into_os_string().into_encoded_bytes();
                "symlink"
            } else if kind.is_fifo() {
                "fifo"
            } else if kind.is_char_device() {
                "device"
            } else {
                content = std::fs::read(&path).expect("a file can be read");
                "file"
            };
            let relative = path.strip_prefix(root).expect("it is below").to_owned();
            if kind != "directory" {
                inodes.entry(meta.ino()).or_default().push(relative.clone());
            }
            let file = File {
                kind,
                mode: meta.mode() & 0o7777,
                owner: (meta.uid(), meta.gid()),
                device: meta.rdev(),
                modified: (meta.mtime(), meta.mtime_nsec()),
                content,
                attributes: attributes(&path),
                names: Vec::new(),
            };
            files.insert(relative, file);
        }
    }
    for mut names in inodes.into_values().filter(|names| names.len() > 1) {
        names.sort();
        for name in &names {
            files.get_mut(name).expect("it was listed").names = names.clone();
        }
    }
    files
}

fn attributes(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 65_536];
    let size = rustix::fs::llistxattr(path, &mut names[..]).expect("attributes can be listed");
    names[..size]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let name = String::from_utf8_lossy(name).into_owned();
            let mut value = vec![0; 65_536];
            let size = rustix::fs::lgetxattr(path, name.as_str(), &mut value[..])
                .expect("what is listed can be read");
            value.truncate(size);
            (name, value)
        })
        .collect()
}

/// What differs between two listings, a line for each path.
#[track_caller]
fn assert_same(before: &BTreeMap<PathBuf, File>, after: &BTreeMap<PathBuf, File>) {
    let short = |file: Option<&File>| {
        file.map_or("absent".to_owned(), |file| {
            let content = String::from_utf8_lossy(&file.content[..file.content.len().min(60)]);
            format!(
                "{} {:04o} {:?} device {} modified {:?} {} bytes {content:?} {:?} {:?}",
                file.kind,
                file.mode,
                file.owner,
                file.device,
                file.modified,
                file.content.len(),
                file.attributes,
                file.names
            )
        })
    };
    let paths: std::collections::BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let differences: Vec<String> = paths
        .into_iter()
        .filter(|path| before.get(*path) != after.get(*path))
        .map(|path| {
            let (before, after) = (short(before.get(path)), short(after.get(path)));
            format!("{}:\n  was {before}\n  is  {after}", path.display())
        })
        .collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// A running container's root file system, as this test can open it.
async fn root_of(host: &Node, container: &str) -> PathBuf {
    let format = "{{.GraphDriver.Data.MergedDir}}";
    let output = host
        .exec(&["podman", "inspect", "-f", format, container])
        .await;
    host.path(output.text())
}

/// `CAP_NET_BIND_SERVICE`, permitted and effective: `struct vfs_cap_data` of linux/capability.h,
/// revision 2.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[tokio::test]
async fn files() {
    let pair = Pair::up().await;
    let publish = ["-p", "7000:7000"];
    pair.host(1)
        .run_workload("web", &publish, &["echo", "7000"])
        .await;
    let root = root_of(pair.host(1), "web").await;
    let image = listing(&root);
    let script = r"
        cd /data
        echo changed >modified
        rm deleted
        mv renamed has-moved
        rm -r deleted-dir
        rm -r replaced-dir; mkdir replaced-dir; echo new >replaced-dir/new
        rm -r dir/two; mkdir dir/two; echo below >dir/two/file
        echo added >added; ln added added-again
        ln dir/one one-more
        chown 1234:4321 owned; chmod 0640 readonly
        echo suid >suid; chmod 4755 suid; mkdir sgid; chmod 2775 sgid; chmod 1777 dir
        chmod 0755 setuid
        ln -s nowhere dangling; ln -sf dir/one link
        mkfifo fifo
        touch -d '2001-02-03 04:05:06' old
        : >nothing; : >secret; chmod 0 secret
        echo x >'a name
with a line break'
        long=$(printf '%0100d' 0); mkdir -p $long/$long/$long; echo far >$long/$long/$long/$long
        dd if=/dev/urandom of=large bs=1024 count=3000 2>/dev/null
        echo attribute >attribute
        mkdir empty
    ";
    let exec = ["podman", "exec", "web", "/bin/sh", "-ec", script];
    pair.host(1).exec(&exec).await;
    let data = root.join("data");
    let set = |path: &str, name: &str, value: &[u8]| {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::lsetxattr(data.join(path), name, value, flags).expect("it can be set");
    };
    set("attribute", "user.comment", b"\0of any bytes\xff");
    set("untouched", "user.comment", b"nothing else of it changed");
    set("sgid", "user.comment", b"a directory's");
    set("suid", "security.capability", &CAPABILITY);
    // A container may not make one, but an image or an administrator may.
    pair.host(1)
        .sh("cd $(podman inspect -f '{{.GraphDriver.Data.MergedDir}}' web)/data && mknod null c 1 3")
        .await;

    let mut before = listing(&root);
    let changed = before
        .iter()
        .filter(|(path, file)| image.get(*path) != Some(file));
    assert!(changed.count() > 30, "the script changed what it should");
    let client = pair
        .client(1)
        .spawn(&["client-echo", &pair.host(1).ip(), "7000"])
        .await;
    migrate(&pair, "web", &[]).await;
    let mut after = listing(&root_of(pair.host(2), "web").await);
    // Podman removes what was deleted after it has unpacked the rest, which touches the directory.
    let data = Path::new("data");
    for listing in [&mut before, &mut after] {
        listing.get_mut(data).expect("it is there").modified = (0, 0);
    }
    assert_same(&before, &after);
    assert_eq!(before[Path::new("data/added")].names.len(), 2);

    // They are its own there: it can change them as before.
    let exec = [
        "podman",
        "exec",
        "web",
        "/bin/sh",
        "-ec",
        "echo on >>/data/modified; cat /data/modified",
    ];
    assert_eq!(pair.host(2).exec(&exec).await.stdout, "changed\non\n");
    let report = client.stop().await;
    assert_eq!(report["same_socket"], true, "{report}");
    assert_eq!(report["wrong"], 0, "{report}");
    pair.down().await;
}

#[tokio::test]
async fn locks_on_files() {
    let pair = Pair::direct(Lab::builder(2)).await;
    let locked = ["files", "7000", "--lock", "/data/modified"];
    let source = pair.host(1);
    source
        .run_workload("web", &["-p", "7000:7000"], &locked)
        .await;
    pair.client(1).ask(source.address(), 7000, "info").await;
    for (from, to, engine) in [(1, 2, "rest"), (2, 1, "direct")] {
        let options = ["--engine", engine];
        let output = pair.try_migrate("web", from, to, &options).await;
        assert!(output.status.success(), "{output}");
        pair.assert_moved("web", from, to, &report(&output)).await;
        // As whoever sees the container's files sees it.
        let root = root_of(pair.host(to), "web").await;
        let take = |name: &str| {
            let file = std::fs::File::open(root.join("data").join(name)).expect("it is there");
            file.try_lock().is_ok()
        };
        assert!(!take("modified"), "the lock did not come along");
        assert!(take("untouched"));
    }
    pair.down().await;
}

/// Official images of databases have their data in such a directory.
#[tokio::test]
async fn the_root_of_a_volume() {
    let pair = Pair::direct(Lab::builder(2)).await;
    let (source, destination) = (pair.host(1), pair.host(2));
    let run = ["-v", "own:/own", "-w", "/own", "-p", "7000:7000"];
    source.run_workload("web", &run, &["echo", "7000"]).await;
    let root = async |host: &Node| {
        let format = "{{.Mountpoint}}";
        let at = host.exec(&["podman", "volume", "inspect", "-f", format, "own"]);
        host.path(at.await.text())
    };
    let stat = |path: &Path| {
        let meta = path.metadata().expect("it is there");
        (meta.uid(), meta.gid(), meta.mode() & 0o7777)
    };
    let at = root(source).await;
    std::os::unix::fs::chown(&at, Some(101), Some(102)).expect("root may");
    source
        .sh("chmod 0700 $(podman volume inspect -f '{{.Mountpoint}}' own)")
        .await;
    assert_eq!(stat(&at), (101, 102, 0o700));

    let refused = pair.try_migrate("web", 1, 2, &["--engine", "rest"]).await;
    assert_eq!(refused.status.code(), Some(3), "{refused}");
    assert!(refused.stdout.contains("volume-root"), "{refused}");
    let output = pair.try_migrate("web", 1, 2, &["--engine", "direct"]).await;
    assert!(output.status.success(), "{output}");
    assert_eq!(stat(&root(destination).await), (101, 102, 0o700));
    pair.down().await;
}

#[tokio::test]
async fn volumes() {
    let pair = Pair::up().await;
    let (source, destination) = (pair.host(1), pair.host(2));
    let fill = r"
        for at in /named /anonymous; do
            cd $at; echo content >file; ln file again; ln -s file link; mkdir deep; echo low >deep/low
            chown 33:44 file; chmod 4750 deep/low; chmod 1770 .
        done
    ";
    let contents = async |host: &Node, volume: &str| {
        let inspect = [
            "podman",
            "volume",
            "inspect",
            "-f",
            "{{.Mountpoint}}",
            volume,
        ];
        let mut files = listing(&host.path(host.exec(&inspect).await.text()));
        // Podman packs volumes, and keeps whole seconds.
        for file in files.values_mut() {
            file.modified.1 = 0;
        }
        files
    };
    let volumes = async |host: &Node| {
        let list = ["podman", "volume", "ls", "--format", "{{.Name}}"];
        let mut names: Vec<String> = host
            .exec(&list)
            .await
            .stdout
            .lines()
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    };
    let start = async |name: &str, volume: &str| {
        let mount = format!("{volume}:/named");
        let options = ["--rm", "-v", &mount, "-v", "/anonymous", "--label", "x=y"];
        source.run_workload(name, &options, &["echo", "7000"]).await;
        source
            .exec(&["podman", "exec", name, "/bin/sh", "-ec", fill])
            .await;
    };

    start("web", "named").await;
    let before = volumes(source).await;
    let [anonymous, named] = &before[..] else {
        panic!("{before:?}");
    };
    let was = (
        contents(source, named).await,
        contents(source, anonymous).await,
    );
    assert_eq!(was.0.len(), 5);
    migrate(&pair, "web", &[]).await;
    assert_same(&was.0, &contents(destination, named).await);
    assert_same(&was.1, &contents(destination, anonymous).await);
    assert_eq!(volumes(source).await, [""; 0], "they have moved");

    // `--rm` still means that it is removed when it stops.
    destination
        .exec(&["podman", "stop", "-t", "5", "web"])
        .await;
    destination
        .sh("while podman container exists web; do sleep 0.05; done")
        .await;
    destination
        .exec(&["podman", "volume", "rm", "-a", "-f"])
        .await;

    // Kept if it is told to, or if another container uses it.
    start("keeper", "kept").await;
    migrate(&pair, "keeper", &["--keep-volumes"]).await;
    assert!(volumes(source).await.contains(&"kept".to_owned()));
    assert!(volumes(destination).await.contains(&"kept".to_owned()));
    source.exec(&["podman", "volume", "rm", "-a", "-f"]).await;
    start("one", "shared").await;
    source
        .run_workload("two", &["-v", "shared:/named"], &["echo", "7000"])
        .await;
    let was = contents(source, "shared").await;
    migrate(&pair, "one", &[]).await;
    assert_eq!(volumes(source).await, ["shared"]);
    assert_same(&was, &contents(destination, "shared").await);
    assert_eq!(
        source.container_state("two").await.as_deref(),
        Some("running")
    );
    pair.down().await;
}

#[tokio::test]
async fn a_network_that_is_missing() {
    let pair = Pair::up().await;
    let (source, destination) = (pair.host(1), pair.host(2));
    source
        .sh("podman network create --subnet 10.91.0.0/24 --gateway 10.91.0.7 --ip-range 10.91.0.64/26 \
             --subnet fd91::/64 --opt mtu=1400 --label kind=lan lan")
        .await;
    let network = async |host: &Node| {
        let mut network = host
            .exec(&["podman", "network", "inspect", "lan"])
            .await
            .json()[0]
            .clone();
        let fields = network.as_object_mut().expect("an object");
        // Its number, its time, its bridge and its guests are the host's own.
        for own in ["id", "created", "network_interface", "containers"] {
            fields.remove(own);
        }
        network
    };
    let run = ["--network", "lan", "-p", "7000:7000"];
    source.run_workload("web", &run, &["echo", "7000"]).await;
    let address = async |host: &Node| {
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}} {{.MacAddress}}{{end}}";
        host.exec(&["podman", "inspect", "-f", format, "web"])
            .await
            .text()
            .to_owned()
    };
    let before = (network(source).await, address(source).await);
    let client = pair
        .client(1)
        .spawn(&["client-echo", &source.ip(), "7000"])
        .await;
    migrate(&pair, "web", &[]).await;
    assert_eq!(
        (network(destination).await, address(destination).await),
        before
    );
    // New connections reach it where it is now.
    let answered = pair
        .client(1)
        .ask(destination.address(), 7000, "info")
        .await;
    assert_eq!(answered["open"], 2, "{answered}");
    let report = client.stop().await;
    assert_eq!(report["same_socket"], true, "{report}");
    assert_eq!(report["wrong"], 0, "{report}");
    pair.down().await;
}

#[tokio::test]
async fn no_network_at_all() {
    let pair = Pair::up().await;
    let before = [pair.host(1).census().await, pair.host(2).census().await];
    pair.host(1)
        .run_workload(
            "mute",
            &["--network", "none"],
            &["touch", "8", "50", "7000"],
        )
        .await;
    let report = migrate(&pair, "mute", &[]).await.pop().expect("a report")["report"].take();
    assert_eq!(report["held"]["held"], 0, "{report}");
    let look = [
        "podman",
        "exec",
        "mute",
        "/workload",
        "ask",
        "127.0.0.1",
        "7000",
        "memory",
    ];
    let memory = pair.host(2).exec(&look).await.json();
    assert_eq!(memory["wrong"], 0, "{memory}");
    assert_eq!(memory["stale"], 0, "{memory}");
    pair.host(2)
        .exec(&["podman", "rm", "-f", "-t", "0", "mute"])
        .await;
    // Not even a tunnel is left: no connection needs one.
    for (host, before) in [pair.host(1), pair.host(2)].into_iter().zip(&before) {
        let after = host.census().await;
        for section in ["nft", "rules", "routes", "links", "listening", "containers"] {
            assert_eq!(after.section(section), before.section(section));
        }
    }
    pair.down().await;
}

#[tokio::test]
async fn the_image_goes_first() {
    const ENOUGH: usize = 4;
    const AT_MOST: usize = 12;
    let pair = Pair::of(Lab::builder(2).cold(2)).await;
    let (source, destination) = (pair.host(1), pair.host(2));
    // Large enough to be seen if it went during the downtime.
    source
        .sh(&format!(
            "cd $(mktemp -d) && dd if=/dev/urandom of=ballast bs=1M count=64 2>/dev/null &&
             printf 'FROM {IMAGE}\nCOPY ballast /\n' >Containerfile && podman build -q -t localhost/heavy . && rm -r $PWD"
        ))
        .await;
    let id = async |host: &Node| {
        let list = [
            "podman",
            "image",
            "ls",
            "--no-trunc",
            "-q",
            "localhost/heavy",
        ];
        host.exec(&list).await.text().to_owned()
    };
    let median = |times: &[f64]| {
        let mut times = times.to_vec();
        times.sort_by(f64::total_cmp);
        (times[(times.len() - 1) / 2] + times[times.len() / 2]) / 2.0
    };
    let [mut cold, mut warm] = [const { Vec::<f64>::new() }; 2];
    loop {
        for is_cold in [true, false] {
            assert_eq!(id(destination).await.is_empty(), is_cold);
            source
                .exec(&[
                    "podman",
                    "run",
                    "-d",
                    "--name",
                    "web",
                    "-p",
                    "7000:7000",
                    "localhost/heavy",
                    "echo",
                    "7000",
                ])
                .await;
            let events = migrate(&pair, "web", &[]).await;
            assert_eq!(id(destination).await, id(source).await, "the exact image");
            let at = |wanted: &dyn Fn(&Value) -> bool| events.iter().position(wanted);
            let sent = at(&|event| event["what"] == "image");
            let held = at(&|event| event["event"] == "started" && event["phase"] == "hold");
            assert_eq!(sent.is_some(), is_cold, "{events:?}");
            assert!(sent < held, "{events:?}");
            let report = &events[events.len() - 1]["report"];
            let times = if is_cold { &mut cold } else { &mut warm };
            times.push(report["downtime_ms"].as_f64().expect("a number"));
            destination
                .exec(&["podman", "rm", "-f", "-t", "0", "web"])
                .await;
        }
        destination.exec(&["podman", "rmi", "-a", "-f"]).await;
        let ratio = median(&cold) / median(&warm);
        // Other work on the machine disturbs single runs; an image that moves during the downtime
        // disturbs all of them.
        if cold.len() >= ENOUGH && ratio <= 1.2 {
            break;
        }
        assert!(
            cold.len() < AT_MOST,
            "cold {cold:?} ms, warm {warm:?} ms: ratio {ratio}"
        );
    }
    pair.down().await;
}
