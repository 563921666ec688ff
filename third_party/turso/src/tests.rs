//! The statements that `cubecl-environment` sends, and files that are no databases.

use std::fs;
use std::path::Path;

use pollster::block_on;

use super::*;

const CREATE: &str =
    "CREATE TABLE entries (space TEXT NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL, PRIMARY KEY (space, key))";
const INSERT: &str = "INSERT INTO entries (space, key, value) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING";
const SELECT: &str = "SELECT value FROM entries WHERE space = ?1 AND key = ?2";

fn open(path: &Path, read_only: bool) -> Result<Connection> {
    block_on(Builder::new_local(path.to_str().unwrap()).read_only(read_only).build())?.connect()
}

fn created(path: &Path) -> Connection {
    let connection = open(path, false).unwrap();
    block_on(connection.execute(CREATE, ())).unwrap();
    connection
}

fn insert(connection: &Connection, key: &[u8], value: &[u8]) -> Result<u64> {
    block_on(connection.execute(INSERT, ("s", key.to_vec(), value.to_vec())))
}

fn select(connection: &Connection, key: &[u8]) -> Option<Vec<u8>> {
    let mut rows = block_on(connection.query(SELECT, ("s", key.to_vec()))).unwrap();
    block_on(rows.next()).unwrap().map(|row| row.get(0).unwrap())
}

#[test]
fn what_is_stored_is_read_back_after_closing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let connection = created(&path);
    assert_eq!(insert(&connection, b"k", b"v"), Ok(1));
    drop(connection);
    let connection = open(&path, false).unwrap();
    assert_eq!(select(&connection, b"k"), Some(b"v".to_vec()));
    assert_eq!(select(&connection, b"other"), None);
}

#[test]
fn a_conflict_changes_no_row() {
    let dir = tempfile::tempdir().unwrap();
    let connection = created(&dir.path().join("a.db"));
    assert_eq!(insert(&connection, b"k", b"first"), Ok(1));
    assert_eq!(insert(&connection, b"k", b"second"), Ok(0));
    assert_eq!(select(&connection, b"k"), Some(b"first".to_vec()));
}

#[test]
fn a_scan_visits_every_row_and_may_write_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let connection = created(&dir.path().join("a.db"));
    for key in 0..100u8 {
        insert(&connection, &[key], &vec![key; 5000]).unwrap();
    }
    let mut rows = block_on(connection.query("SELECT key, value, length(value), space FROM entries", ())).unwrap();
    let mut count = 0;
    while let Some(row) = block_on(rows.next()).unwrap() {
        let key: Vec<u8> = row.get(0).unwrap();
        assert_eq!(row.get::<Vec<u8>>(1).unwrap(), vec![key[0]; 5000]);
        assert_eq!(row.get::<i64>(2), Ok(5000));
        assert_eq!(row.get::<String>(3), Ok("s".to_owned()));
        assert!(row.get::<i64>(0).is_err() && row.get::<i64>(4).is_err());
        insert(&connection, &[key[0], 1], b"").unwrap();
        count += 1;
    }
    assert_eq!(count, 100);
}

#[test]
fn a_transaction_lands_as_a_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let mut connection = created(&path);
    for behavior in [TransactionBehavior::Deferred, TransactionBehavior::Immediate] {
        let transaction = block_on(connection.transaction_with_behavior(behavior)).unwrap();
        insert(&transaction, b"dropped", b"v").unwrap();
        assert!(select(&transaction, b"dropped").is_some());
        drop(transaction);
        assert_eq!(select(&connection, b"dropped"), None);
    }
    let transaction = block_on(connection.transaction_with_behavior(TransactionBehavior::Immediate)).unwrap();
    insert(&transaction, b"kept", b"v").unwrap();
    assert_eq!(select(&open(&path, false).unwrap(), b"kept"), None);
    block_on(transaction.commit()).unwrap();
    assert!(select(&open(&path, false).unwrap(), b"kept").is_some());
}

#[test]
fn a_second_writer_waits_then_is_told_busy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let mut first = created(&path);
    let second = open(&path, false).unwrap();
    let transaction = block_on(first.transaction_with_behavior(TransactionBehavior::Immediate)).unwrap();
    assert!(matches!(insert(&second, b"k", b"v"), Err(Error::Busy(_))));
    std::thread::scope(|scope| {
        second.busy_timeout(Duration::from_secs(60)).unwrap();
        let waiting = scope.spawn(move || insert(&second, b"k", b"v"));
        std::thread::sleep(Duration::from_millis(50));
        block_on(transaction.commit()).unwrap();
        assert_eq!(waiting.join().unwrap(), Ok(1));
    });
    assert!(select(&first, b"k").is_some());
}

#[test]
fn read_only_reads_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    assert!(open(&path, true).is_err());
    assert!(!path.exists());
    insert(&created(&path), b"k", b"v").unwrap();
    let before = fs::read(&path).unwrap();
    let connection = open(&path, true).unwrap();
    block_on(connection.pragma_query("synchronous = NORMAL", |_| Ok(()))).unwrap();
    assert!(select(&connection, b"k").is_some());
    assert!(matches!(insert(&connection, b"l", b"v"), Err(Error::Error(_))));
    drop(connection);
    assert_eq!(fs::read(&path).unwrap(), before);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no file is left beside it");
}

#[test]
fn pragmas_answer_with_rows_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let connection = created(&dir.path().join("a.db"));
    let mut answers = Vec::new();
    let mut read = |row: &Row| {
        answers.push(row.get::<i64>(0)?);
        Ok(())
    };
    block_on(connection.pragma_query("synchronous = NORMAL", &mut read)).unwrap();
    block_on(connection.pragma_query("synchronous", &mut read)).unwrap();
    block_on(connection.pragma_query("wal_checkpoint(TRUNCATE)", &mut read)).unwrap();
    assert_eq!(answers, [1, 0]);
    let error = block_on(connection.pragma_query("synchronous", |_| Err(Error::Error("mine".to_owned()))));
    assert_eq!(error, Err(Error::Error("mine".to_owned())));
    assert_eq!(block_on(connection.execute("VACUUM", ())), Ok(0));
}

#[test]
fn a_missing_table_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let connection = open(&dir.path().join("a.db"), false).unwrap();
    let error = block_on(connection.query("SELECT v FROM meta", ())).unwrap_err();
    // `cubecl-environment` looks for these words.
    assert!(error.to_string().contains("no such table"), "{error}");
}

#[test]
fn damaged_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    fs::write(&path, [7; 9000]).unwrap();
    assert!(matches!(open(&path, false), Err(Error::Error(_))));
    assert!(matches!(open(&path, true), Err(Error::Error(_))));
    fs::remove_file(&path).unwrap();

    let connection = created(&path);
    for key in 0..50u8 {
        insert(&connection, &[key], &[key; 1000]).unwrap();
    }
    drop(connection);
    let whole = fs::read(&path).unwrap();
    for length in [99, 100, 2000, 4096, 10_000, whole.len() / 2, whole.len() - 4096] {
        fs::write(&path, &whole[..length]).unwrap();
        for read_only in [false, true] {
            let error = open(&path, read_only).unwrap_err();
            assert!(error.to_string().contains("is damaged"), "{length} of {} bytes: {error}", whole.len());
        }
    }
    // An inner page, which opening alone doesn't read.
    let mut overwritten = whole.clone();
    overwritten[8192..12_288].fill(7);
    fs::write(&path, overwritten).unwrap();
    assert!(open(&path, false).unwrap_err().to_string().contains("is damaged"));
}

#[test]
fn a_folder_or_a_missing_folder_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    assert!(open(dir.path(), false).is_err());
    assert!(open(&dir.path().join("missing/a.db"), false).is_err());
}

#[test]
fn what_threads_share_can_be_shared() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<Database>();
    shared::<Error>();
    shared::<Rows>();
    sent::<Connection>();
}
