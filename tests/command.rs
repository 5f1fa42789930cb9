//! What the command prints for people, word for word. What differs from run to run is masked.

mod lab;

use lab::pair::Pair;
use lab::{Lab, Node, Output};

/// Runs the command as in a terminal of 100 columns.
async fn livemig(host: &Node, arguments: &str) -> Output {
    let line = format!("COLUMNS=100 exec livemig {arguments}");
    host.try_exec(&["sh", "-c", &line]).await
}

/// Replaces numbers with a fraction, identifiers and fingerprints, and joins the blanks that their
/// width made.
/// The engine that hosts of tests are set up for.
fn engine() -> String {
    std::env::var("LIVEMIG_TEST_ENGINE").unwrap_or("rest".to_owned())
}

fn masked(text: &str) -> String {
    let word = |word: &str| -> String {
        let bare = word.trim_end_matches([',', ';']);
        let end = &word[bare.len()..];
        let hexadecimal = bare.bytes().all(|byte| byte.is_ascii_hexdigit());
        let mask = if bare.starts_with("SHA256:") {
            "FINGERPRINT"
        } else if (bare.len() == 12 || bare.len() == 64) && hexadecimal {
            "ID"
        } else if bare.contains('.') && bare.parse::<f64>().is_ok() {
            "N.N"
        } else {
            bare
        };
        format!("{mask}{end}")
    };
    let line = |line: &str| {
        line.split_whitespace()
            .map(word)
            .collect::<Vec<_>>()
            .join(" ")
    };
    // How far a transfer is, is told about once a second, so it depends on the machine.
    text.lines()
        .filter(|text| !text.starts_with("sending the "))
        .map(|text| line(text) + "\n")
        .collect()
}

#[tokio::test]
async fn looking_and_moving() {
    let pair = Pair::up().await;
    let (source, destination) = (pair.host(1), pair.host(2));
    let options = [
        "-p",
        "7000:7000",
        "--ip",
        "10.88.0.9",
        "-v",
        "data:/data",
        "--log-driver",
        "k8s-file",
    ];
    source
        .run_workload("web", &options, &["echo", "7000"])
        .await;
    let client = pair
        .client(1)
        .spawn(&["client-echo", &source.ip(), "7000"])
        .await;

    let output = livemig(source, "check web --to h2").await;
    assert_eq!(output.status.code(), Some(0), "{output}");
    assert_eq!(
        output.stdout,
        format!(
            "    CHECKED      RESULT
ok  hosts        CRIU, kernel, runtime and processor fit; engine: {}
ok  container    it can be taken apart from its host; its name and ID are free
ok  image        it is there
ok  storage      its changed files go along; so do its volumes (data)
ok  network      10.88.0.9 and 7000/tcp are free
ok  connections  1 goes along
`web` can move to h2
",
            engine()
        )
    );
    let output = livemig(source, "plan web --to h2").await;
    let plan = output.stdout.split("\n\n").next().unwrap_or_default();
    assert_eq!(
        plan,
        "\
PHASE    WHERE      WHAT                                     UNDONE BY
prepare  this host  tunnel to h2, its routing table and      remove them, unless another migration
                    rules                                    uses the tunnel
prepare  h2         tunnel to this host, its routing table   remove them, unless another migration
                    and rules                                uses the tunnel
hold     this host  packets for `web` wait, at most 65536    let them go
                    and 256 MiB of them
freeze   this host  its processes are frozen, its state is   thaw them
                    dumped
freeze   this host  1 flow is marked for the tunnel          clear the marks
restore  h2         1 flow is entered into connection        delete them
                    tracking
restore  h2         `web` is restored, with volumes data     remove it
steer    this host  the waiting packets go to the            let them go to the container here
                    destination
commit   this host  `web` is removed                         - (past the point of no return)
commit   this host  volumes data are removed, unless         - (past the point of no return)
                    another container uses them"
    );
    let output = livemig(source, "ps").await;
    assert_eq!(
        masked(&output.stdout),
        "ID NAME STATE ADDRESSES FLOWS THROUGH HOPS IMAGE\n\
         ID web running 10.88.0.9 1 0 localhost/workload:latest\n"
    );
    let output = livemig(source, "hosts").await;
    assert_eq!(
        masked(&output.stdout),
        "NAME ADDRESS MAY FINGERPRINT\nh2 10.77.0.12:27757 send,receive FINGERPRINT\n"
    );

    destination
        .exec(&["podman", "volume", "create", "data"])
        .await;
    let output = livemig(source, "check web --to h2").await;
    assert_eq!(output.status.code(), Some(3), "{output}");
    assert_eq!(
        output.stdout,
        format!(
            "    CHECKED      RESULT
ok  hosts        CRIU, kernel, runtime and processor fit; engine: {}
ok  container    it can be taken apart from its host; its name and ID are free
ok  image        it is there
no  storage      the destination has a volume data already, and what is in it would be lost
                 (volume-exists)
                 → remove or rename it there: podman volume rm data
ok  network      10.88.0.9 and 7000/tcp are free
ok  connections  1 goes along
`web` cannot move to h2
",
            engine()
        )
    );
    let output = livemig(source, "migrate web --to h2").await;
    assert_eq!(
        output.stderr,
        "\
livemig: `web` cannot move to h2: the destination has a volume data already, and what is in it would be lost
  → remove or rename it there: podman volume rm data
"
    );
    destination.exec(&["podman", "volume", "rm", "data"]).await;

    let output = livemig(source, "migrate web --to h2 --rehearse hold").await;
    assert_eq!(output.status.code(), Some(0), "{output}");
    assert_eq!(
        output.stdout,
        "rehearsed up to the end of phase hold; everything was undone, and `web` runs on here\n"
    );
    assert_eq!(
        masked(&output.stderr),
        "\
preflight N.N ms
prepare N.N ms
precopy N.N ms
hold N.N ms
undoing everything, because: rehearsed up to the end of phase hold
undone: what h2 has restored
undone: flows steered into livemig1
undone: the rule that keeps the frozen container quiet
undone: frozen processes
undone: packets waiting in the kernel
undone: what h2 has prepared
undone: the tunnel, its routes and rules
"
    );

    let output = livemig(source, "migrate web --to h2").await;
    assert_eq!(output.status.code(), Some(0), "{output}");
    let (line, _) = output
        .stdout
        .split_once(" ms without service")
        .expect("it says how long");
    assert!(line.starts_with("web runs on h2 now: "), "{output}");
    assert!(output.stdout.contains(", 1 connection kept, "), "{output}");
    assert_eq!(
        masked(&output.stderr),
        "\
preflight N.N ms
prepare N.N ms
precopy N.N ms
hold N.N ms
freeze N.N ms
transfer N.N ms
restore N.N ms
steer N.N ms
commit N.N ms
"
    );

    let headings = "CONTAINER PROTOCOL OPENED CONNECTION IN OUT TO IT THROUGH FROM IT THROUGH";
    let port = {
        let output = livemig(source, "flows --json").await.json();
        output[0]["flow"]["seen"]["protocol"].to_string()
    };
    for (host, container, to, from) in [
        (source, "10.88.0.9", "h2", "-"),
        (destination, "web", "-", "h1"),
    ] {
        let output = livemig(host, "flows").await;
        let lines: Vec<&str> = output.stdout.lines().collect();
        let [heading, flow, ..] = lines[..] else {
            panic!("{port}: {output}");
        };
        let heading: Vec<&str> = heading.split_whitespace().collect();
        assert_eq!(heading.join(" "), headings);
        let words: Vec<&str> = flow.split_whitespace().collect();
        assert_eq!(words[..3], [container, "tcp", "inbound"], "{output}");
        assert_eq!(words[words.len() - 2..], [to, from], "{output}");
        assert!(
            heading.len() < 100 && flow.chars().count() <= 100,
            "{output}"
        );
    }
    let report = client.stop().await;
    assert_eq!(report["same_socket"], true, "{report}");
    pair.down().await;
}

#[tokio::test]
async fn help() {
    let lab = Lab::new(1).await;
    let host = lab.host(1);
    let output = livemig(host, "--help").await;
    assert!(
        output.stdout.contains(
            "\n  host-b# livemig invite                  # prints a token, good for one use\n"
        ),
        "{output}"
    );
    for line in output.stdout.lines() {
        assert!(line.chars().count() <= 100, "{line}");
    }
    for number in [0, 1, 2, 3, 4, 5, 6, 7, 8, 130] {
        let said = output
            .stdout
            .lines()
            .any(|line| line.starts_with(&format!("  {number} ")));
        assert!(said, "no exit code {number} in {output}");
    }
    let verbs = "agent invite join hosts allow revoke rekey migrate check plan ps flows recover completions";
    for verb in verbs.split(' ') {
        assert!(output.stdout.contains(&format!("\n  {verb} ")), "{output}");
        let help = livemig(host, &format!("{verb} --help")).await;
        assert_eq!(help.status.code(), Some(0), "{help}");
        let (_, places) = help
            .stdout
            .split_once("\nPlaces:\n")
            .expect("places are told");
        assert!(!places.contains("\n      --json"), "it is no place: {help}");
        for line in help.stdout.lines() {
            assert!(line.chars().count() <= 100, "{verb}: {line}");
        }
    }
    lab.down().await;
}
