"""One Parquet file of records: its columns, value codecs, writer and reader."""
