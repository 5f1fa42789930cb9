//! Real programs, as Debian ships them, moved under load: with one engine to the second host, and with
//! the other one back. Their own clients check every answer, and are connected from the beginning to
//! the end. Then the program is restarted, to see that its files came along too.

mod lab;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lab::pair::{Pair, assert_went_on, report};
use lab::{LOOK, Lab, Node, Output, Process};
use livemig::netlink::Namespace;

/// From where to where, with which engine.
type Move = (usize, usize, &'static str);

/// There and back.
const MOVES: [Move; 2] = [(1, 2, "rest"), (2, 1, "direct")];

/// Two hosts that have the image of this program.
async fn hosts(program: &str, runtime: &str) -> Pair {
    Pair::direct(Lab::builder(2).with(program).runtime(runtime)).await
}

/// Starts a container of the program on the first host.
async fn start(pair: &Pair, program: &str, podman: &[&str], arguments: &[&str]) {
    let image = format!("localhost/{program}:latest");
    let mut command = vec!["podman", "run", "-d", "--name", program];
    command.extend(podman);
    command.push(&image);
    command.extend(arguments);
    pair.host(1).exec(&command).await;
}

/// CRIU fails now and then at where the kernel has put a page of one process, and with 20 of them as much more
/// often. What livemig advises then is done: it has undone everything, and can begin again.
const ADVICE: &str = "try again: CRIU before its pull request 3012";

async fn migrate(pair: &Pair, program: &str, one: Move) {
    let (from, to, engine) = one;
    let mut tries = 0;
    let output = loop {
        let more = ["--engine", engine];
        let output = pair.try_migrate(program, from, to, &more).await;
        tries += 1;
        if tries == 3 || !output.stdout.contains(ADVICE) {
            break output;
        }
        println!("{output}");
    };
    assert_arrived(pair, program, one, &output).await;
}

/// Waits for the end of a migration that has begun.
async fn arrived(pair: &Pair, program: &str, one: Move, migration: Process) {
    let output = migration.finish().await;
    assert_arrived(pair, program, one, &output).await;
}

async fn assert_arrived(pair: &Pair, program: &str, (from, to, engine): Move, output: &Output) {
    assert!(output.status.success(), "{output}");
    let report = report(output);
    pair.assert_moved(program, from, to, &report).await;
    assert_eq!(report["engine"], engine, "{report}");
    println!("{program}, {engine}: {} ms", report["downtime_ms"]);
}

/// Tries a command until it succeeds, as a program that has just been started needs it.
async fn until_ready(node: &Node, command: &[&str]) -> Output {
    let mut tries = 0;
    loop {
        let output = node.try_exec(command).await;
        if output.status.success() {
            return output;
        }
        tries += 1;
        assert!(tries < 200, "{output}");
        tokio::time::sleep(LOOK).await;
    }
}

/// `redis-cli`'s answer to one command.
async fn redis(pair: &Pair, host: usize, command: &[&str]) -> String {
    let address = pair.host(host).ip();
    let mut all = vec!["redis-cli", "-e", "-h", &address];
    all.extend(command);
    pair.client(1).exec(&all).await.text().to_owned()
}

/// A client of redis that goes on.
fn redis_client(pair: &Pair, command: &[&str]) -> Process {
    let address = pair.host(1).ip();
    let mut all = vec!["redis-cli", "-e", "-h", &address];
    all.extend(command);
    pair.client(1).spawn_command(&all)
}

/// Panics unless these are numbers, each greater by one than the one before; returns the last.
#[track_caller]
fn counted(output: &Output) -> u64 {
    let mut last = 0;
    for line in output.stdout.lines() {
        assert_eq!(
            line.parse(),
            Ok(last + 1),
            "after {last}: {}",
            output.stderr
        );
        last += 1;
    }
    last
}

/// Threads, a child that writes a snapshot while it is moved, a log of all that is written, clients
/// that wait for something to happen.
#[tokio::test]
async fn redis_keeps_every_key_and_every_client() {
    const FILL: &str = "for n = 1, 20000 do redis.call('set', 'key:' .. n, redis.sha1hex(n)) end";
    const COUNT: &str = "local right = 0
        for n = 1, 20000 do
            if redis.call('get', 'key:' .. n) == redis.sha1hex(n) then right = right + 1 end
        end
        return right";
    let pair = hosts("redis", "crun").await;
    let server = ["--protected-mode", "no", "--io-threads", "3"];
    let files = ["--dir", "/data", "--appendonly", "yes", "--save", ""];
    // Microseconds a key: a snapshot that begins with a move is to be under way when it has arrived, also
    // where two labs, a load and a debug build share two cores.
    let slowly = ["--rdb-key-save-delay", "500"];
    let publish = ["-p", "6379:6379", "-v", "redis:/data"];
    start(
        &pair,
        "redis",
        &publish,
        &[&server[..], &files, &slowly].concat(),
    )
    .await;
    let address = pair.host(1).ip();
    until_ready(pair.client(1), &["redis-cli", "-e", "-h", &address, "ping"]).await;
    redis(&pair, 1, &["eval", FILL, "0"]).await;

    let counter = redis_client(&pair, &["-r", "-1", "incr", "counter"]);
    let waiting = redis_client(&pair, &["blpop", "queue", "0"]);
    let listening = redis_client(&pair, &["subscribe", "news"]);
    listening.wait_for("subscribe").await;
    // It ends when one of its connections does.
    let load = [
        "redis-benchmark",
        "-h",
        &address,
        "-c",
        "20",
        "-t",
        "set,get,lpush",
        "-l",
        "-q",
    ];
    let mut load = pair.client(1).spawn_command(&load);
    for one in MOVES {
        let (from, to, engine) = one;
        let migration = pair.spawn_migration("redis", from, to, &["--engine", engine]);
        migration.wait_for(r#""phase":"prepare""#).await;
        redis(&pair, from, &["bgsave"]).await;
        arrived(&pair, "redis", one, migration).await;
        let saving = redis(&pair, to, &["info", "persistence"]).await;
        assert!(saving.contains("rdb_bgsave_in_progress:1"), "{saving}");
        let wrong = redis(&pair, to, &["eval", COUNT, "0"]).await;
        assert_eq!(wrong, "20000");
        let at = pair.host(to).name();
        redis(&pair, to, &["publish", "news", at]).await;
        listening.wait_for(at).await;
        while redis(&pair, to, &["info", "persistence"])
            .await
            .contains("rdb_bgsave_in_progress:1")
        {
            tokio::time::sleep(LOOK).await;
        }
        let saved = redis(&pair, to, &["info", "persistence"]).await;
        assert!(saved.contains("rdb_last_bgsave_status:ok"), "{saved}");
        assert!(saved.contains("aof_last_write_status:ok"), "{saved}");
        assert!(load.is_running(), "{}{}", load.stdout(), load.stderr());
    }
    redis(&pair, 1, &["rpush", "queue", "at last"]).await;
    let waited = waiting.finish().await;
    assert_eq!(waited.text(), "queue\nat last", "{waited}");
    load.stop().await;
    let last = counted(&counter.stop().await);
    assert!(last > 1000, "{last}");

    // What was answered is in the files.
    pair.host(1).exec(&["podman", "restart", "redis"]).await;
    until_ready(pair.client(1), &["redis-cli", "-e", "-h", &address, "ping"]).await;
    assert_eq!(redis(&pair, 1, &["eval", COUNT, "0"]).await, "20000");
    let kept = redis(&pair, 1, &["get", "counter"]).await;
    let kept: u64 = kept.parse().expect("a number");
    // One more may have been under way when its client was stopped.
    assert!((last..=last + 1).contains(&kept), "{last} became {kept}");
    pair.down().await;
}

/// `psql`'s answers to one command, without headings.
async fn psql(pair: &Pair, host: usize, command: &str) -> String {
    let address = pair.host(host).ip();
    let options = [
        "psql",
        "-h",
        &address,
        "-U",
        "postgres",
        "-qAtX",
        "-v",
        "ON_ERROR_STOP=1",
        "-c",
    ];
    let output = pair
        .client(1)
        .exec(&[&options[..], &[command]].concat())
        .await;
    output.text().to_owned()
}

/// Whether a line of `/proc/PID/status` has CAP_SYS_RESOURCE (capabilities(7), number 24).
fn has_sys_resource(line: &str) -> bool {
    let mask = line.split_whitespace().last().unwrap_or_default();
    u64::from_str_radix(mask, 16).is_ok_and(|mask| mask & 1 << 24 != 0)
}

/// Many processes with memory that they share, files that they have mapped, a transaction that is open
/// across both moves while others go on, at last a crash, of which only the files are left.
#[tokio::test]
async fn postgresql_keeps_every_transaction() {
    let pair = hosts("postgresql", "runc").await;
    // It does not run as root, and CRIU may not be able to dump anyone else.
    let user = match pair
        .host(1)
        .sh("grep CapEff: /proc/self/status")
        .await
        .text()
    {
        text if has_sys_resource(text) => ["--user", "postgres"],
        _ => ["-e", "LD_PRELOAD=/not-root.so"],
    };
    println!("postgresql is run with {user:?}");
    let podman = [&["-p", "5432:5432", "-v", "database:/data"], &user[..]].concat();
    let server = [
        "-D",
        "/data/pg",
        "-c",
        "listen_addresses=*",
        "-c",
        "unix_socket_directories=/tmp",
    ];
    start(&pair, "postgresql", &podman, &server).await;
    let (address, client) = (pair.host(1).ip(), pair.client(1));
    let to = ["-h", &address, "-U", "postgres"];
    let ready = [&["psql"], &to[..], &["-c", "select 1"]].concat();
    until_ready(client, &ready).await;
    let fill = [&["pgbench"], &to[..], &["-i", "-q", "-s", "1", "postgres"]].concat();
    client.exec(&fill).await;
    psql(&pair, 1, "create table notes (what text primary key)").await;

    let talk = [&["psql"], &to[..], &["-qAtX", "-v", "ON_ERROR_STOP=1"]].concat();
    let mut transaction = client.spawn_listening(&talk);
    transaction
        .tell("begin isolation level repeatable read; insert into notes values ('begun');")
        .await;
    transaction
        .tell("select 'seen ' || count(*) from notes, pgbench_history;")
        .await;
    transaction.wait_for("seen 0").await;
    let mut waiting = client.spawn_listening(&talk);
    waiting
        .tell("select 'listens'; insert into notes values ('begun') on conflict do nothing;")
        .await;
    waiting.wait_for("listens").await;
    // Each transaction changes four tables, and tells of itself in one.
    let load = [
        &["pgbench"],
        &to[..],
        &["-n", "-c", "8", "-T", "3600", "postgres"],
    ]
    .concat();
    let mut load = client.spawn_command(&load);
    while psql(&pair, 1, "select count(*) < 100 from pgbench_history").await == "t" {
        tokio::time::sleep(LOOK).await;
    }
    for one in MOVES {
        migrate(&pair, "postgresql", one).await;
        assert!(load.is_running(), "{}{}", load.stdout(), load.stderr());
        let at = pair.host(one.1).name();
        transaction
            .tell(&format!("insert into notes values ('{at}');"))
            .await;
        // It sees what there was when it began, and nobody sees what it does.
        transaction
            .tell(&format!(
                "select 'at {at} ' || count(*) from pgbench_history;"
            ))
            .await;
        transaction.wait_for(&format!("at {at} 0")).await;
        assert_eq!(psql(&pair, one.1, "select count(*) from notes").await, "0");
    }
    transaction.tell("commit;").await;
    transaction
        .tell("select 'in all ' || count(*) from notes;")
        .await;
    transaction.wait_for("in all 3").await;
    // This one waited for the other to end, and found its row.
    waiting.tell("select 'went on';").await;
    waiting.wait_for("went on").await;
    // The signal of its own timer: it ends as if its time were up, and counts.
    load.signal(rustix::process::Signal::ALARM);
    let load = load.finish().await;
    assert!(load.status.success(), "{load}");
    let number = |heading: &str| -> u64 {
        let line = load
            .stdout
            .lines()
            .find_map(|line| line.strip_prefix(heading));
        let words = line.unwrap_or_else(|| panic!("no {heading:?} in {load}"));
        let word = words.split_whitespace().next();
        word.and_then(|word| word.parse().ok())
            .unwrap_or_else(|| panic!("{load}"))
    };
    assert_eq!(number("number of failed transactions:"), 0);
    let done = number("number of transactions actually processed:");

    // What was committed is in the files: a server that is killed starts from nothing else.
    pair.host(1)
        .exec(&["podman", "kill", "-s", "KILL", "postgresql"])
        .await;
    pair.host(1).exec(&["podman", "wait", "postgresql"]).await;
    pair.host(1).exec(&["podman", "start", "postgresql"]).await;
    until_ready(client, &ready).await;
    const SUMS: &str = "select (select count(*) from notes), (select count(*) from pgbench_history),
        (select sum(delta) from pgbench_history) = all (array[
            (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers),
            (select sum(bbalance) from pgbench_branches)])";
    assert_eq!(psql(&pair, 1, SUMS).await, format!("3|{done}|t"));
    pair.down().await;
}

/// A connection that is kept alive, from a client's network.
struct Browser {
    stream: BufReader<TcpStream>,
}

impl Browser {
    fn connect(client: &Node, to: &Node) -> Browser {
        let address = (to.address(), 8080);
        let namespace = Namespace::path(&client.network_namespace()).expect("it is there");
        let stream = namespace.run(|| TcpStream::connect(address));
        let stream = stream.expect("entered").expect("connected");
        let patience = Some(Duration::from_secs(30));
        stream.set_read_timeout(patience).expect("set");
        Browser {
            stream: BufReader::new(stream),
        }
    }

    /// Gets the file of so many lines, and says what is wrong with it.
    fn get(&mut self, lines: usize) -> std::io::Result<Result<(), String>> {
        let request = format!("GET /{lines} HTTP/1.1\r\nHost: nginx\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut status = String::new();
        self.stream.read_line(&mut status)?;
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line)?;
            match line.trim_end().split_once(": ") {
                Some((name, value)) => headers.insert(name.to_lowercase(), value.to_owned()),
                None => break,
            };
        }
        let length = headers
            .get("content-length")
            .and_then(|text| text.parse().ok());
        let mut body = vec![0; length.unwrap_or_default()];
        self.stream.read_exact(&mut body)?;
        let kept = headers.get("connection").map(String::as_str) == Some("keep-alive");
        let right: String = (1..=lines)
            .map(|line| format!("{line} of {lines}\n"))
            .collect();
        if status.trim_end() != "HTTP/1.1 200 OK" || !kept || body != right.as_bytes() {
            return Ok(Err(format!("{status} {headers:?} {} bytes", body.len())));
        }
        Ok(Ok(()))
    }
}

/// A master and its workers, which share the socket that they listen with; connections in the middle of
/// answers, others kept alive with nothing to do.
#[tokio::test]
async fn nginx_keeps_connections_alive() {
    let pair = hosts("nginx", "crun").await;
    start(&pair, "nginx", &["-p", "8080:8080"], &[]).await;
    let (host, client) = (pair.host(1), pair.client(1));
    until_ready(
        host,
        &["curl", "-sf", "-o", "/dev/null", "http://127.0.0.1:8080/1"],
    )
    .await;
    let mut idle: Vec<Browser> = (0..4).map(|_| Browser::connect(client, host)).collect();
    for browser in &mut idle {
        assert_eq!(browser.get(1).expect("answered"), Ok(()));
    }
    let enough = Arc::new(AtomicBool::new(false));
    // The longest takes a while: it is under way in each move.
    let busy = [&[1, 100, 10_000][..], &[10_000], &[100], &[1_000_000]].map(|files| {
        let (mut browser, enough) = (Browser::connect(client, host), enough.clone());
        thread::spawn(move || {
            let mut count = 0;
            while !enough.load(Ordering::Relaxed) {
                for lines in files {
                    match browser.get(*lines) {
                        Ok(Ok(())) => count += 1,
                        wrong => return Err(format!("after {count} answers: {wrong:?}")),
                    }
                }
            }
            Ok(count)
        })
    });
    for one in MOVES {
        migrate(&pair, "nginx", one).await;
        for browser in &mut idle {
            assert_eq!(browser.get(100).expect("answered"), Ok(()));
        }
    }
    enough.store(true, Ordering::Relaxed);
    // The one that showed that it is ready; one of each idle connection, and one after each move.
    let mut answers = 1 + idle.len() * (1 + MOVES.len());
    for browser in busy {
        let count = browser.join().expect("no panic");
        let count = count.expect("all answers right");
        assert!(count > 0, "no answer");
        answers += count;
    }
    // All of them, and no others, are in the log, on whichever host they were given.
    let log = "cat /var/log/nginx/access.log";
    let log = ["podman", "exec", "nginx", "/bin/busybox", "sh", "-c", log];
    let log = pair.host(1).exec(&log).await.stdout;
    assert!(log.lines().all(|line| line.contains("\" 200 ")), "{log}");
    assert_eq!(log.lines().count(), answers);
    pair.down().await;
}

/// Our own program, whose members pass a number round, and check it.
async fn ring(runtime: &str, verb: &str, members: usize, count: &str) {
    let pair = Pair::direct(Lab::builder(2).runtime(runtime)).await;
    let number = members.to_string();
    let source = pair.host(1);
    source
        .run_workload("ring", &["-p", "7000:7000"], &[verb, &number, "7000"])
        .await;
    let client = pair
        .client(1)
        .spawn(&["client-echo", &source.ip(), "7000", "--connections", "4"])
        .await;
    let mut rounds = 0;
    for one in MOVES {
        let before = pair
            .client(1)
            .ask(pair.host(one.0).address(), 7000, "ring")
            .await;
        migrate(&pair, "ring", one).await;
        let after = loop {
            let after = pair
                .client(1)
                .ask(pair.host(one.1).address(), 7000, "ring")
                .await;
            if after["rounds"].as_u64() > before["rounds"].as_u64().map(|rounds| rounds + 100) {
                break after;
            }
        };
        assert_eq!(after["wrong"], 0, "{after}");
        assert_eq!(after["members"], members, "{after}");
        rounds = after["rounds"].as_u64().expect("a number");
        let counted = pair
            .host(one.1)
            .exec(&["podman", "exec", "ring", "/bin/sh", "-c", count])
            .await;
        assert!(
            counted.text().parse::<usize>().expect("a number") > members,
            "{counted}"
        );
    }
    println!("{verb}: {rounds} rounds of {members}");
    assert_went_on(&client.stop().await, 4);
    pair.down().await;
}

#[tokio::test]
async fn threads_wait_for_each_other() {
    ring("runc", "threads", 40, "ls /proc/1/task | wc -l").await;
}

#[tokio::test]
async fn processes_wait_for_each_other() {
    ring("crun", "processes", 20, "ls -d /proc/[0-9]* | wc -l").await;
}
